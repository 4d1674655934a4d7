"""T5's tokenizer from its sentencepiece file, as transformers converts it."""

from typing import Any

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_SPACE = "▁"


def parse_model(model: bytes) -> Any:
    """The protobuf message of a spiece.model's bytes."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    return messages.ModelProto.FromString(model)  # pyrefly: ignore[missing-attribute]  (made by protobuf at import)


def tokenizer(model: bytes, extra_ids: int = 0, *, first_word: bool = True, after_special_tokens: bool = True) -> Any:
    """tokenizers.Tokenizer of a spiece.model's bytes, with <extra_id_{n-1}> … <extra_id_0> after its pieces.

    first_word: whether a text's first word is marked like those after a space; after_special_tokens: whether a word
    after a special token is, too. ValueError for a model that isn't a unigram one; what sentencepiece raises for a
    damaged one.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    SentencePieceProcessor(model_proto=model)  # checks more than its message's form
    proto = parse_model(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise ValueError("T5's unigram model was expected, and it holds one of another kind")
    extra = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    vocabulary = [*((piece.piece, piece.score) for piece in proto.pieces), *((name, 0.0) for name in extra)]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
    kinds = proto.SentencePiece
    made.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == kinds.CONTROL)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)
        ]
    )
    made.add_special_tokens([AddedToken(name, normalized=False) for name in (UNKNOWN, *extra)])
    charsmap = proto.normalizer_spec.precompiled_charsmap
    made.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), _SPACE),
        ]
    )
    scheme = "never" if not first_word else "always" if after_special_tokens else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    made.post_processor = processors.TemplateProcessing(
        single=["$A", END], pair=["$A", END, "$B", END], special_tokens=[(END, made.token_to_id(END))]
    )
    return made
