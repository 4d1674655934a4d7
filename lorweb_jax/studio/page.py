"""The page: its views as tabs, its look, and how it is served."""

import errno
import os
import socket

import gradio as gr

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.studio.edit_view import EditView
from lorweb_jax.studio.look_view import LookView
from lorweb_jax.studio.mix_view import MixView
from lorweb_jax.studio.studio import Studio
from lorweb_jax.studio.style_view import StyleView

EDIT = "edit"  # the first tab
PORTS = 50  # that are tried, from the one that was asked for
WAITING = 64  # requests of all tabs that may wait for the device
_SANS = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]
CSS = """
.gradio-container > main { max-width: 1280px; margin: 0 auto; width: 100%; }
.lw-hint { color: var(--body-text-color-subdued); }
.lw-progress { display: flex; flex-wrap: wrap; gap: .6em; align-items: center; min-height: 2em; }
.lw-progress progress { flex: 1 1 12em; height: .8em; border: 0; background: var(--background-fill-secondary); }
.lw-progress progress::-webkit-progress-bar { background: var(--background-fill-secondary); }
.lw-progress progress::-webkit-progress-value { background: var(--color-accent); }
.lw-progress progress::-moz-progress-bar { background: var(--color-accent); }
.lw-picture img { width: 100%; height: 100%; object-fit: contain; }
.lw-picture .image-frame, .lw-gallery .grid-wrap { box-sizing: border-box; padding-top: 1.9rem; }
.lw-figure svg { width: 100%; height: auto; }
.lw-figure text { fill: var(--body-text-color); font: 11px ui-sans-serif, system-ui, sans-serif; }
.lw-figure .grid { stroke: var(--border-color-primary); }
.lw-figure .cell { fill: var(--color-accent); }
.lw-figure [data-index] { cursor: pointer; }
.lw-figure [data-index]:focus-visible circle { stroke: var(--body-text-color); stroke-width: 2; r: 6px; }
@media (max-width: 700px) {
  .lw-gallery .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
}
.lw-table td, .lw-table th { padding: .15em 1em .15em 0; text-align: left; }
"""


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio, not yet served."""

    def leave(request: gr.Request) -> None:
        studio.runner.leave(request.session_hash or "")

    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder / "served")  # not the machine's own, which is readable to all
    with gr.Blocks(title="lorweb_jax studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Visual analogies\na : a′ :: b : b′")
        with gr.Tabs() as tabs:
            with gr.Tab("Edit", id=EDIT):
                edits = EditView(studio)
            if studio.has_mixes:
                with gr.Tab("Mix"):
                    MixView(studio)
                with gr.Tab("Look inside"):
                    LookView(studio, edits, tabs, EDIT)
            with gr.Tab("Style"):
                StyleView(studio)
        page.unload(leave)
    return page.queue(max_size=WAITING, default_concurrency_limit=4)


def free_port(host: str, wanted: int) -> int:
    """The first port from `wanted` on that nobody listens at. UserError where there is none among PORTS of them, and
    for a host that isn't this machine's."""
    for port in range(wanted, min(wanted + PORTS, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return port
            except (OSError, OverflowError) as error:
                if getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                    raise UserError(
                        f"the page can't be served at {host} ({getattr(error, 'strerror', None) or error}); give an "
                        "address of this machine, such as 127.0.0.1",
                        2,
                    ) from None
    raise UserError(f"the ports from {wanted} on are all in use; give another --port", 2)


def serve(
    page: gr.Blocks,
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    browser: bool = False,
) -> str:
    """Serve the page from a thread of its own; returns its address. The next free port is taken, and said.

    Nothing of the machine is served but what the page makes itself, in the studio's folder.
    """
    taken = free_port(host, port)
    if taken != port:
        say(f"port {port} is in use; the page takes {taken}")
    _, address, shared = page.launch(
        server_name=host,
        server_port=taken,
        share=share,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=[],
        allowed_paths=[],
        max_file_size=studio.limits.nbytes,
        enable_monitoring=False,
        strict_cors=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=_SANS, font_mono=_MONO),
        css=CSS,
    )
    return shared or address
