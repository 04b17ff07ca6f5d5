"""Sparse autoencoders, put to the test: all variants, one contract, honest metrics."""

from sae_lib import loggers, metrics
from sae_lib.activations import Activations
from sae_lib.cached import CachedActivations
from sae_lib.data import Batch, PlantedDictionary, load_texts
from sae_lib.formats import load
from sae_lib.metrics.evaluation import evaluate
from sae_lib.models import load_model
from sae_lib.sae import SAE
from sae_lib.saes import (
    ATMSAE,
    GBASAE,
    VARIANTS,
    BatchTopKSAE,
    EquivariantSAE,
    FeatureChoiceSAE,
    GatedSAE,
    GradientSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    MutualChoiceSAE,
    ReLUSAE,
    TopKSAE,
)
from sae_lib.train import Run, train
