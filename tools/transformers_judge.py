"""A vision-language model of transformers as the judge of lorweb_jax.evaluate, in this process.

    python -m lorweb_jax.evaluate --out OUT --judge tools/transformers_judge.py:local=FOLDER

FOLDER holds a model that answers texts with images (Qwen2-VL, SmolVLM, LLaVA and others that transformers'
AutoModelForImageTextToText reads) with its processor and chat template. It runs on the GPU where there is one.
"""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.evaluation.chat import Unanswered, data_url

TRIES = 4  # the first greedy, further ones drawn
LONGEST = 64  # tokens of an answer


class Local:
    """Follows lorweb_jax.evaluation.chat.Judge. UserError for a folder without such a model."""

    def __init__(self, folder: str):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.url, self.model = folder, Path(folder).resolve().name
        self._torch, self._weights, self._lock = torch, fingerprint.of_folder(folder), threading.Lock()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            network = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype="auto")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} holds no model for images and texts that transformers reads "
                f"({printable(' '.join(str(error).split()), 200)}); check the folder"
            ) from None
        if not getattr(self._processor, "chat_template", None):
            raise UserError(f"{folder} has no chat template; give the folder of a model that was trained to answer")
        self._network = network.eval().to(device)

    def question(self, text: str, images: Sequence[tuple[str, np.ndarray]]) -> dict[str, Any]:
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        for title, image in images:
            content += [{"type": "text", "text": title}, {"type": "image", "url": data_url(image)}]
        return {"messages": [{"role": "user", "content": content}]}

    def digest(self, body: dict[str, Any]) -> str:
        return fingerprint.of_text(json.dumps([self._weights, body], sort_keys=True))

    def ask(self, body: dict[str, Any], parse: Callable[[str], Any]) -> Any:
        """As Endpoint.ask. Raises Unanswered where no try gives an answer of the form."""
        problem = ""
        with self._lock:  # one model, whose random state is the process's
            inputs = self._processor.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._network.device, self._network.dtype)
            for number in range(TRIES):
                self._torch.manual_seed(number)
                with self._torch.inference_mode():
                    tokens = self._network.generate(**inputs, do_sample=number > 0, max_new_tokens=LONGEST)
                answer = tokens[0, inputs["input_ids"].shape[1] :]
                try:
                    return parse(self._processor.decode(answer, skip_special_tokens=True).strip())
                except ValueError as error:
                    problem = f"malformed answer: {printable(str(error), 200)}"
        raise Unanswered(problem)


def local(folder: str = "") -> Local:
    """The judge in a folder. Raises UserError where there is none."""
    if not Path(folder).is_dir() or not folder:
        raise UserError(f"there is no folder {folder!r}; give that of a vision-language model: local=FOLDER")
    return Local(folder)
