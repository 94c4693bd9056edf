"""The command `mbrl-text reward audit`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    ParametersOption,
    PlainOption,
    PromptsOption,
    SeedOption,
    ServerModelOption,
    TokenizerOption,
    TokensOption,
    WaitOption,
    as_many_as_are,
    as_plain,
    console,
    friendly,
    load_language_model,
    load_prompts_option,
    that_fit,
)


@friendly
def audit_command(
    proxy: Annotated[
        str, typer.Option(help="The reward to audit: a name, or a weighted sum of names.")
    ],
    gold: Annotated[str, typer.Option(help="The reward that is trusted.")],
    num_prompts: Annotated[int, typer.Option(help="At least 4; below 8 nothing is decided.")] = 32,
    samples: Annotated[
        int, typer.Option(help="Responses to each prompt, at least 4: the largest N.")
    ] = 64,
    max_response_tokens: TokensOption = 64,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder of the audit; resumed if it exists.")] = Path(
        "audit"
    ),
    pool: Annotated[
        Path | None,
        typer.Option(help="Records folder to take the responses from; missing ones are added."),
    ] = None,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    num_parameters: ParametersOption = None,
    server_model: ServerModelOption = None,
    max_wait: WaitOption = 60.0,
    plain_prompts: PlainOption = False,
    prompts: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="Split of the prompts; 'all' for all.")] = "test",
    sensitivity_samples: Annotated[
        int, typer.Option(help="Responses to each prompt that text changes are tried on.")
    ] = 8,
) -> None:
    """Audit a reward: does choosing by it raise another that is trusted? Can be resumed."""
    from mbrl_text_env.benchmarks.audit.report import summary
    from mbrl_text_env.benchmarks.audit.result import AuditConfig
    from mbrl_text_env.benchmarks.audit.run import Audit, choose_for_both, run_audit
    from mbrl_text_env.benchmarks.progress import progress_bar
    from mbrl_text_env.rewards import make
    from mbrl_text_env.rewards.base import applies_to

    proxy_model, gold_model = make(proxy), make(gold)
    found = load_prompts_option(prompts, split)
    there = sum(applies_to(proxy_model, p) and applies_to(gold_model, p) for p in found)
    config = AuditConfig(
        proxy,
        gold,
        as_many_as_are(there, num_prompts, prompts),
        samples,
        max_response_tokens,
        seed,
        sensitivity_samples,
    )
    chosen, left_out = choose_for_both(found, config, proxy_model, gold_model)
    if plain_prompts:
        chosen = [as_plain(prompt) for prompt in chosen]
    model = load_language_model(
        language_model, dtype, tokenizer, num_parameters, server_model, max_wait
    )
    labels = {"prompts_source": prompts, "split": split, "dtype": dtype}
    audit = Audit(
        config,
        that_fit(chosen, model),
        model,
        proxy_model,
        gold_model,
        left_out,
        labels,
    )
    options: dict[str, Any] = {
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
        "out": out,
        "pool": pool,
        "language_model": language_model,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "num_parameters": num_parameters,
        "model": server_model,
        "plain_prompts": plain_prompts or None,
        "prompts": prompts,
        "split": split,
    }
    with progress_bar(console) as bar:
        totals = {"pool": len(chosen) * samples, "proxy": len(chosen), "gold": len(chosen)}
        if audit.trivial:
            del totals["gold"]
        tasks = {
            "pool": bar.add_task("Responses", total=totals["pool"]),
            "proxy": bar.add_task(f"Prompts scored by {proxy}", total=totals["proxy"]),
        }
        if not audit.trivial:
            tasks["gold"] = bar.add_task(f"Prompts scored by {gold}", total=totals["gold"])
        result = run_audit(
            audit,
            out,
            pool=pool,
            command=_command(options),
            on_progress=lambda stage, count: bar.advance(tasks[stage], count),
        )
    console.print(summary(result))
    console.print(f"audit.json and audit.png: {out.resolve()}")


def _command(options: dict[str, Any]) -> str:
    """The command line that asks for the same audit again."""
    words = ["mbrl-text", "reward", "audit"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
