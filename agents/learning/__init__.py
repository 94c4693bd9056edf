"""Self-training: policies that learn from their own scored responses."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "answers": ["collect_answers"],
        "expert_iteration": ["ExpertIteration"],
        "filters": [
            "FilterError",
            "FilterSettings",
            "at_least",
            "best_of_prompt",
            "correct_only",
            "select",
            "top_fraction",
            "without_duplicates",
        ],
        "fine_tuning": [
            "FineTuneReport",
            "FineTuneSettings",
            "Improvement",
            "Improver",
            "LoraImprover",
            "fine_tune",
        ],
        "lora": ["AdapterSettings", "check_base", "serve"],
        "presets": [
            "LoopSettings",
            "LoopSettingsError",
            "answer_hint",
            "planned",
            "rejection_sampling",
            "rest_em",
            "star",
        ],
        "reports": [
            "Divergence",
            "Diversity",
            "GoldCheck",
            "IterationReport",
            "LoopResult",
            "Validation",
            "ValueCheck",
            "ValueReport",
            "check_gold",
            "check_value",
            "divergence",
            "diversity",
        ],
        "stages": ["LoopError", "NoSignalError"],
        "training": ["TuningError"],
    },
)
