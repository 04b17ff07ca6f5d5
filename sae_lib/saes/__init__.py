"""One file = one paper. Reading them from top to bottom is reading the book's table of selections."""

from sae_lib.saes.atm import ATMSAE
from sae_lib.saes.batchtopk import BatchTopKSAE
from sae_lib.saes.choice import FeatureChoiceSAE, MutualChoiceSAE
from sae_lib.saes.equivariant import EquivariantSAE
from sae_lib.saes.gated import GatedSAE
from sae_lib.saes.gba import GBASAE
from sae_lib.saes.gradient import GradientSAE
from sae_lib.saes.jumprelu import JumpReLUSAE
from sae_lib.saes.matryoshka import MatryoshkaSAE
from sae_lib.saes.relu import ReLUSAE
from sae_lib.saes.topk import TopKSAE

VARIANTS = {
    variant.name: variant
    for variant in (
        ReLUSAE,
        GatedSAE,
        TopKSAE,
        JumpReLUSAE,
        BatchTopKSAE,
        MatryoshkaSAE,
        MutualChoiceSAE,
        FeatureChoiceSAE,
        GradientSAE,
        ATMSAE,
        GBASAE,
        EquivariantSAE,
    )
}
"""One-word name -> class."""
