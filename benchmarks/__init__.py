"""Comparisons of agents at matched compute, their statistics, and the command line."""

import sys
from importlib.util import find_spec
from pathlib import Path


def _find_own_agents() -> None:
    """Have `agents` be the one beside this package.

    openai-agents, which verifiers requires, installs a package of that name, and an installed one
    comes before an editable one.
    """
    root = Path(__file__).resolve().parent.parent
    found = find_spec("agents")
    origin = None if found is None or found.origin is None else Path(found.origin).resolve()
    if origin == root / "agents" / "__init__.py" and (root / "agents" / "planner.py").exists():
        return
    if "agents" in sys.modules or not (root / "agents" / "planner.py").exists():
        raise ImportError(
            f"Expected the package `agents` of mbrl_text_env, got {origin}, which another "
            "distribution installed (openai-agents has one of that name). Uninstall that, or "
            "install mbrl_text_env in an environment of its own."
        )
    sys.path.insert(0, str(root))


_find_own_agents()
