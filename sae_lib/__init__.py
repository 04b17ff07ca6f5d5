"""Sparse autoencoders, put to the test: all variants, one contract, honest metrics."""

from sae_lib.data import Batch
from sae_lib.formats import load
from sae_lib.sae import SAE
from sae_lib.saes import VARIANTS, BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from sae_lib.train import Run, train
