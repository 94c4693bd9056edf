"""Self-training: policies that learn from their own scored responses."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "answers": [
            *("FilterError", "FilterSettings", "collect_answers", "select"),
        ],
        "expert_iteration": ["ExpertIteration"],
        "lora": [
            *("AdapterSettings", "FineTuneReport", "FineTuneSettings"),
            *("check_base", "fine_tune", "serve"),
        ],
        "presets": [
            *("LoopSettings", "LoopSettingsError", "answer_hint"),
            *("planned", "rejection_sampling", "rest_em", "star"),
        ],
        "reports": [
            *("Divergence", "Diversity", "GoldCheck", "Validation", "ValueCheck"),
            *("IterationReport", "LoopResult", "ValueReport"),
            *("check_gold", "check_value", "divergence", "diversity"),
        ],
        "stages": ["Improvement", "LoopError", "LoraImprover", "NoSignalError"],
        "training": ["TuningError"],
    },
)
