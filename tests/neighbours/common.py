"""What the neighbours are tried on: small, fast environments."""

from mbrl_text_env.language_models import NGramLM
from tests.toys import LetterEncoder, toy_options

TEXT, CANDIDATES = "mbrl_text_env/TextGeneration-v0", "mbrl_text_env/CandidateChunks-v0"
PADDED = toy_options(action_format="padded", observation="tokens")
EMBEDDED = toy_options(action_format="padded", observation="embedding", encoder=LetterEncoder())
VIEW = {
    "language_model": NGramLM("abcde", order=2, seed=1),
    "num_candidates": 3,
    "encoder": None,
    **toy_options(),
}
