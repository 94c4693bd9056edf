"""Text generation as a Gymnasium environment.

A state is a prompt and a response prefix, an action is a chunk of tokens, and the reward comes from
any reward model. Importing the package registers the environments with Gymnasium.
"""

import gymnasium as _gymnasium

from mbrl_text_env._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "checks": [
            "CheckError",
            "check_agent",
            "check_language_model",
            "check_reward_model",
            "check_text_env",
        ],
        "env": ["TextGenerationEnv", "TextGenerationVectorEnv"],
        "prompts": ["load_prompts"],
        "records": ["Record", "RecordWriter", "read_records"],
        "spaces": ["ChunkSpace", "UnicodeText"],
        "mdp": [
            *("ChunkRules", "EpisodeEndedError", "InvalidChunkError"),
            *("initial", "is_terminal", "transition"),
        ],
        "types": [
            *("Chunk", "Message", "Prompt", "TextState"),
            *("Budget", "BudgetError", "BudgetExceededError", "Ledger", "Usage"),
        ],
        "values": ["ValueEstimate", "ValueModel", "predict_values"],
        "wrappers": [
            *("CandidateChunks", "CandidateChunksVector", "KLPenalty", "PotentialShaping")
        ],
    },
)

_gymnasium.register(
    id="mbrl_text_env/TextGeneration-v0",
    entry_point="mbrl_text_env.env:TextGenerationEnv",
    vector_entry_point="mbrl_text_env.env:TextGenerationVectorEnv",
)
_gymnasium.register(
    id="mbrl_text_env/CandidateChunks-v0",
    entry_point="mbrl_text_env.wrappers:make_candidate_chunks",
    vector_entry_point="mbrl_text_env.wrappers:make_candidate_chunks",
)
