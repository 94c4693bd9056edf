"""Language models: the interface, transformers models, servers, embedded models and exact toys."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": [
            "NextTokens",
            "SampleRequest",
            "FeatureModel",
            "LanguageModel",
            "PromptEncodingError",
            "PromptTooLongError",
            "SamplingParams",
            "Tokenizer",
            "UnknownTokenError",
        ],
        "registry": ["embedded", "embedded_encoder", "embedded_tokenizer"],
        "_http": [
            *("MalformedAnswerError", "ServerConfigError", "ServerError"),
            *("ServerUnavailableError", "UnsupportedByServerError"),
        ],
        "server": ["ServerLM"],
        "toy": ["CharTokenizer", "NGramLM", "TableLM"],
        "hf_tokenizer": ["HFTokenizer", "ModelLoadError"],
        "transformers_lm": ["TransformersLM"],
    },
)
