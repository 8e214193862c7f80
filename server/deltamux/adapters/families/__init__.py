"""The families that are served, in the order in which they are asked."""

from deltamux.adapters.families.adalora import AdaLora
from deltamux.adapters.families.beft import Beft
from deltamux.adapters.families.boft import Boft
from deltamux.adapters.families.bottlenecks import Bottlenecks
from deltamux.adapters.families.c3a import C3a
from deltamux.adapters.families.deft import Deft
from deltamux.adapters.families.delora import DeLora
from deltamux.adapters.families.delta import Delta
from deltamux.adapters.families.dora_adapterhub import AdapterHubDora
from deltamux.adapters.families.fourierft import Fourierft
from deltamux.adapters.families.frod import Frod
from deltamux.adapters.families.glora import Glora
from deltamux.adapters.families.gralora import GraLora
from deltamux.adapters.families.hira import Hira
from deltamux.adapters.families.hra import Hra
from deltamux.adapters.families.ia3 import Ia3
from deltamux.adapters.families.ln_tuning import LnTuning
from deltamux.adapters.families.loha import LoHa
from deltamux.adapters.families.lokr import LoKr
from deltamux.adapters.families.lora import Lora
from deltamux.adapters.families.lora_adapterhub import AdapterHubIa3, AdapterHubLora
from deltamux.adapters.families.miss import Miss
from deltamux.adapters.families.mtl_lora import MtlLora
from deltamux.adapters.families.oft import Oft
from deltamux.adapters.families.osf import Osf
from deltamux.adapters.families.peanut import Peanut
from deltamux.adapters.families.poly import Poly
from deltamux.adapters.families.prefix_tuning import CARTRIDGE, PREFIX_TUNING
from deltamux.adapters.families.prefix_tuning_adapterhub import AdapterHubPrefixTuning
from deltamux.adapters.families.prompt_tuning import (
    CPT,
    MULTITASK_PROMPT_TUNING,
    P_TUNING,
    PROMPT_TUNING,
)
from deltamux.adapters.families.randlora import Randlora
from deltamux.adapters.families.reft import LoReft
from deltamux.adapters.families.road import Road
from deltamux.adapters.families.shira import Shira
from deltamux.adapters.families.supertuning import Supertuning
from deltamux.adapters.families.tinylora import TinyLora
from deltamux.adapters.families.trainable_tokens import TrainableTokens
from deltamux.adapters.families.unilora import UniLora
from deltamux.adapters.families.union import Union
from deltamux.adapters.families.vblora import VbLora
from deltamux.adapters.families.vera import Vera
from deltamux.adapters.families.vera_adapterhub import AdapterHubVera
from deltamux.adapters.families.waveft import Waveft
from deltamux.adapters.family import Family

# AdapterHub's methods, of which a union of its is made.
_METHODS: tuple[Family, ...] = (
    AdapterHubDora(),
    AdapterHubIa3(),
    AdapterHubLora(),
    AdapterHubPrefixTuning(),
    AdapterHubVera(),
    Bottlenecks(),
    LoReft(),
    MtlLora(),
)

FAMILIES: tuple[Family, ...] = (
    *_METHODS,
    Lora(),
    AdaLora(),
    Beft(),
    Boft(),
    C3a(),
    CARTRIDGE,
    CPT,
    Deft(),
    DeLora(),
    Delta(),
    Fourierft(),
    Frod(),
    Glora(),
    GraLora(),
    Hira(),
    Hra(),
    Ia3(),
    LnTuning(),
    LoHa(),
    LoKr(),
    Miss(),
    MULTITASK_PROMPT_TUNING,
    Oft(),
    Osf(),
    Peanut(),
    Poly(),
    PREFIX_TUNING,
    PROMPT_TUNING,
    P_TUNING,
    Randlora(),
    Road(),
    Shira(),
    Supertuning(),
    TinyLora(),
    TrainableTokens(),
    UniLora(),
    Union(*_METHODS),
    VbLora(),
    Vera(),
    Waveft(),
)
