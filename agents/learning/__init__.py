"""Self-training: policies that learn from their own scored responses."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "fine_tuning": ["FineTuneReport", "FineTuneSettings", "fine_tune"],
        "lora": ["AdapterSettings", "TuningError", "check_base", "serve"],
    },
)
