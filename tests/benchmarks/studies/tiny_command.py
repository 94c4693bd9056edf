"""A study's command on a tiny model, which can be stopped on its way."""

import textwrap

import typer
from typer.testing import CliRunner

from tests.language_models.conftest import (
    CHAT_TEMPLATE,
    make_config,
    save_model,
    train_tokenizer,
)

TOKENS = 8


class Command:
    """A command on a tiny model, with a reward in a file: the share of ASCII letters.

    Args:
        main: The command's function.
        folder: Of the model and the reward's file.
        options: Of the command.
    """

    def __init__(self, main, folder, options):
        self.folder, self.options = folder, options
        self.app = typer.Typer()
        self.app.command()(main)
        tokenizer = train_tokenizer(chat_template=CHAT_TEMPLATE)
        # Builtin prompts are longer than those of the other tests.
        config = make_config("llama", tokenizer.eos_token_id, max_position_embeddings=512)
        self.model = save_model(folder / "tiny", config, tokenizer)
        self.reward = folder / "letters.py"
        self.reward.write_text(
            textwrap.dedent(
                """
                import os
                import signal
                from pathlib import Path

                STOP = Path(__file__).with_name("stop")

                def letters(prompt, response):
                    if STOP.is_file() and Path(STOP.read_text()).exists():
                        STOP.unlink()
                        os.kill(os.getpid(), signal.SIGINT)
                    count = sum(c.isalpha() and c.isascii() for c in response)
                    return count / max(1, len(response))
                """
            )
        )

    def run(self, out, *, stop_after=None, **changes):
        """Run in a folder; Ctrl-C comes with the first score once a file of it is there."""
        if stop_after is not None:
            (self.folder / "stop").write_text(str(out / stop_after))
        options = {
            **self.options,
            "--reward": f"{self.reward}:letters",
            "--language-model": str(self.model),
            "--dtype": "float32",
            "--max-response-tokens": str(TOKENS),
            "--out": str(out),
            "--json": str(out.with_suffix(".json")),
            **{f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()},
        }
        words = [word for pair in options.items() for word in pair]
        return CliRunner(env={"COLUMNS": "200"}).invoke(self.app, words)


def said(result):
    """What a command told, without line ends."""
    return " ".join(result.output.split())
