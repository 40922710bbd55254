"""What tokens cost: a table that the user gives, as a provider asks for them.

Place in the flow: a file -> **prices** -> what requests and training cost. Knows money and numbers of tokens; knows no
tokenizer and no run.
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
    """What tokens cost, as the user's provider asks for them.

    Args:
        currency: what it is counted in, such as ``"USD"``.
        input_per_million: price of a million tokens of a prompt, read anew.
        cached_input_per_million: the same, behind a prefix cache.
        output_per_million: of an answer.
        training_per_million: of finetuning, for a million tokens that are trained on; None where it is not counted.
        finetuned_factor: what tokens of a finetuned model cost against those of the model as it is, the prices above.

    Raises:
        GistError: a price is no finite number of at least 0, or the currency is no text.
    """

    currency: str
    input_per_million: float
    cached_input_per_million: float
    output_per_million: float
    training_per_million: float | None = None
    finetuned_factor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.currency, str) or not self.currency.strip():
            raise GistError(f"currency must be a text such as USD, got {self.currency!r}")
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
        """What one request costs.

        Args:
            tokens: of the prompt with its query, cached ones included.
            cached_tokens: those of them that are behind a prefix cache.
            output_tokens: of the answer.
            is_finetuned: whether the model is.

        Returns:
            Money, in ``currency``.

        Raises:
            GistError: a number is negative, or more are cached than there are.
        """
        if not 0 <= cached_tokens <= tokens or output_tokens < 0:
            raise GistError(
                "tokens must be at least cached_tokens, and no number below 0, got "
                f"{tokens:g} with {cached_tokens:g} cached and {output_tokens:g} answered"
            )
        paid = (tokens - cached_tokens) * self.input_per_million + cached_tokens * self.cached_input_per_million
        paid += output_tokens * self.output_per_million
        return paid * (self.finetuned_factor if is_finetuned else 1.0) / 1e6

    def training(self, tokens: float) -> float | None:
        """What it costs to train on so many ``tokens``, in ``currency``; None where the table does not say."""
        return None if self.training_per_million is None else tokens * self.training_per_million / 1e6


def load_prices(path: str | Path) -> Prices:
    """The price table in the file ``path``: YAML or JSON, a mapping of the names that :class:`Prices` has.

    Raises:
        GistError: there is no such file, it is no such mapping, a name is unknown, missing or there twice, or as
            :class:`Prices`; the file is named.
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
