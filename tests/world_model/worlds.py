"""Records of toy language models, shared by the tests of world models."""

from functools import cache

from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.records import Record
from mbrl_text_env.rewards import RewardModel
from mbrl_text_env.types import Prompt, TextState
from mbrl_text_env.world_model import (
    EnsembleDynamics,
    IncrementDynamics,
    TextFeature,
    count_feature,
)

PROMPTS = [Prompt.from_text(text) for text in ("a", "b", "ab", "ba", "aa", "bb", "aba", "bab")]
LIMIT = 6
# Tokens are independent: increments do not depend on the state.
LM = NGramLM("ab ", order=1, seed=3, stop_probability=0.15)


def count_a(text):
    return text.count("a")


def count_b(text):
    return text.count("b")


FEATURES = (TextFeature("a", count_a), TextFeature("b", count_b), count_feature("words"))


class Share(RewardModel):
    """How many of a letter there are."""

    name = "share of b"

    def score(self, prompts, responses):
        return [response.count("b") / LIMIT for response in responses]

    def feature_names(self, prompt):
        return ["b"]

    def score_features(self, prompt, features):
        return features["b"] / LIMIT


def records_of(lm=LM, samples=40, limit=LIMIT, seed=0, prompts=PROMPTS):
    """Responses without a score."""
    found = []
    for prompt in prompts:
        state = initial(prompt, lm)
        [chunks] = lm.sample([state], samples, limit, seeds=[seed])
        for k, chunk in enumerate(chunks):
            end = transition(state, chunk, limit)
            found.append(
                Record.from_state(
                    end,
                    response=lm.decode(end.response_ids),
                    score=None,
                    rewards={},
                    reward_name="",
                    agent="sampling",
                    language_model=lm.name,
                    seed=0,
                    sample=k,
                )
            )
    return found


def state_of(text, lm=LM, prompt=PROMPTS[0], reason=None):
    return TextState(prompt, lm.encode_prompt(prompt), tuple(lm.encode_text(text)), reason)


def fitted(features=FEATURES, lm=LM, **options):
    return IncrementDynamics(lm, features, **{"stride": 1, **options}).fit(records_of(lm))


@cache
def ensemble():
    return EnsembleDynamics(LM, FEATURES, members=4, elites=3, hidden=32, stride=1).fit(
        records_of(samples=100)
    )
