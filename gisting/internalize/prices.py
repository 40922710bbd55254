"""What tokens cost, from a table of a provider's prices that the user supplies.

Place in the flow: a file -> **prices** -> the cost of requests and training. Pure arithmetic on prices and numbers of
tokens; independent of tokenizers and runs.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from gisting.errors import GistError

__all__ = ["Prices", "load_prices"]


@dataclass(frozen=True)
class Prices:
    """The prices of the user's provider.

    Args:
        currency: the currency, such as ``"USD"``.
        input_per_million: price of a million input tokens that are not cached.
        cached_input_per_million: price of a million input tokens that are in a prefix cache.
        output_per_million: price of a million tokens of answers.
        training_per_million: price of a million tokens that are trained on; None to leave out the cost of training.
        finetuned_factor: factor by which the tokens of a finetuned model cost more than the prices above.

    Raises:
        GistError: a price is not a finite number of at least 0, or the currency is not text.
    """

    currency: str
    input_per_million: float
    cached_input_per_million: float
    output_per_million: float
    training_per_million: float | None = None
    finetuned_factor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.currency, str) or not self.currency.strip():
            raise GistError(f"currency must be text such as USD, got {self.currency!r}")
        for one in fields(self)[1:]:
            value = getattr(self, one.name)
            if value is None and one.name == "training_per_million":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                what = "a factor" if one.name == "finetuned_factor" else "a price for a million tokens"
                raise GistError(f"{one.name} must be {what}, a number of at least 0, got {value!r}")

    def request(
        self, tokens: float, cached_tokens: float, output_tokens: float, *, is_finetuned: bool = False
    ) -> float:
        """Compute the cost of one request.

        Args:
            tokens: tokens of the prompt with its query, including cached ones.
            cached_tokens: how many of them are in a prefix cache.
            output_tokens: tokens of the answer.
            is_finetuned: whether the model is finetuned.

        Returns:
            The cost in ``currency``.

        Raises:
            GistError: a number is negative, or ``cached_tokens`` is more than ``tokens``.
        """
        if not 0 <= cached_tokens <= tokens or output_tokens < 0:
            raise GistError(
                "tokens must be at least cached_tokens, and no number may be negative, got "
                f"tokens={tokens:g}, cached_tokens={cached_tokens:g}, output_tokens={output_tokens:g}"
            )
        paid = (tokens - cached_tokens) * self.input_per_million + cached_tokens * self.cached_input_per_million
        paid += output_tokens * self.output_per_million
        return paid * (self.finetuned_factor if is_finetuned else 1.0) / 1e6

    def training(self, tokens: float) -> float | None:
        """Compute the cost of training on this many ``tokens``, in ``currency``; None without a price for it."""
        return None if self.training_per_million is None else tokens * self.training_per_million / 1e6


def load_prices(path: str | Path) -> Prices:
    """Read a price table from ``path``: YAML or JSON, with the fields of :class:`Prices` as names.

    Raises:
        GistError: the file is missing or is not such a mapping, a name is unknown, missing or repeated, or a value is
            refused by :class:`Prices`; the message names the file.
    """
    import yaml

    names = [one.name for one in fields(Prices)]
    try:
        text = Path(path).read_text(encoding="utf-8")
        # JSON is YAML, but for a tab.
        if text.lstrip().startswith("{"):
            pairs = json.loads(text, object_pairs_hook=list)
        else:
            root, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
            if not isinstance(root, yaml.MappingNode):
                raise GistError(f"{path} must hold prices, one 'name: number' a line ({', '.join(names)})")
            pairs = [(key.value, values.get(key.value)) for key, _ in root.value]
    except FileNotFoundError:
        raise GistError(f"there is no price table {path}; write one with {', '.join(names)}") from None
    except OSError as error:
        raise GistError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise GistError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.42)
            hint = f"did you mean {near[0]}?" if near else f"a price table has {', '.join(names)}"
            raise GistError(f"{path}: there is no price {name!r}; {hint}")
        if name in found:
            raise GistError(f"{path}: {name} stands twice; take one out")
        found[name] = value if name == "currency" else _number(value)
    missing = [one.name for one in fields(Prices) if one.default is MISSING and one.name not in found]
    if missing:
        raise GistError(f"{path}: {', '.join(missing)} must be there")
    try:
        return Prices(**found)
    except GistError as error:
        raise GistError(f"{path}: {error}") from None


def _number(value: Any) -> Any:
    """PyYAML reads YAML 1.1, where 3e1 is a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
