"""The families that are served, in the order in which they are asked."""

from deltamux.adapters.families.boft import Boft
from deltamux.adapters.families.bottlenecks import Bottlenecks
from deltamux.adapters.families.delta import Delta
from deltamux.adapters.families.ia3 import Ia3
from deltamux.adapters.families.ln_tuning import LnTuning
from deltamux.adapters.families.lora import Lora
from deltamux.adapters.families.oft import Oft
from deltamux.adapters.families.road import Road
from deltamux.adapters.families.shira import Shira
from deltamux.adapters.families.trainable_tokens import TrainableTokens
from deltamux.adapters.family import Family

FAMILIES: tuple[Family, ...] = (
    Lora(),
    Ia3(),
    LnTuning(),
    Shira(),
    TrainableTokens(),
    Bottlenecks(),
    Delta(),
    Oft(),
    Boft(),
    Road(),
)
