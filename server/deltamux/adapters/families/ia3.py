"""IA3 in PEFT's format: a scale of the output, or of the input of feed-forward modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deltamux.adapters.checkpoint.fields import Fields, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.patterns import Pattern
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.input_scale import InputScale
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_scale import OutputScale
from deltamux.base.structure import SiteSpec

_VECTOR = "ia3_l"

# How vectors were first drawn; fan_in_fan_out says what the base shows.
_HARMLESS = ("fan_in_fan_out", "init_ia3_weights")


class Ia3(ModuleFamily):
    """The output is scaled with its bias; a feed-forward module's input is scaled instead."""

    name = "ia3"
    peft_types = ("IA3",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            feedforward = _feedforward(fields.take("feedforward_modules"))
            return _Ia3(read_targets(fields), Names((_VECTOR,)), feedforward)


@dataclass(frozen=True, eq=False)
class _Ia3(Tuner):
    feedforward: Pattern | tuple[str, ...]

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        if self._is_feedforward(site.name):
            shape = (1, site.in_features)
            yield InputScale(given.modules.take_shaped(site, _VECTOR, shape).flatten())
        else:
            shape = (site.out_features, 1)
            yield OutputScale(given.modules.take_shaped(site, _VECTOR, shape).flatten())

    def _is_feedforward(self, module: str) -> bool:
        """As PEFT decides it: a name in the list may begin in the middle of a word."""
        if isinstance(self.feedforward, Pattern):
            return self.feedforward.matches(module)
        return module.endswith(self.feedforward)


def _feedforward(value: Json) -> Pattern | tuple[str, ...]:
    if value is None:
        refuse_field("feedforward_modules", value, "given: a pattern or a list of modules")
    if isinstance(value, str):
        return Pattern(value)
    return Fields({"feedforward_modules": value}).take_names("feedforward_modules")
