"""What is measured: functions on tensors, each with its equation, its units and what it is blind to."""

from sae_lib.metrics.absorption import (
    absorption_by_ablation,
    absorption_fraction,
    absorption_older,
    full_absorption,
    planted_absorption,
)
from sae_lib.metrics.attribution import LatentEffects, ablation, gradient_times_activation, integrated_gradients
from sae_lib.metrics.autointerp import Autointerp
from sae_lib.metrics.choice_by_gradient import ChoiceByGradient
from sae_lib.metrics.consistency import shared_latents, strongest_shared
from sae_lib.metrics.equivariance import (
    OneMatrix,
    code_invariance,
    equivariance_error,
    map_r2,
    orbit_probing,
    order_error,
    pose_accuracy,
    top1_f1,
)
from sae_lib.metrics.first_letter import FirstLetter
from sae_lib.metrics.main_latents import KSparseProbe, OneVsRest, feature_splits, k_sparse_probe, one_vs_rest
from sae_lib.metrics.masks import each_way, mask_shares, masked_codes
from sae_lib.metrics.matched import matched_mean
from sae_lib.metrics.ngrams import NGrams
from sae_lib.metrics.patched import PatchedLoss
from sae_lib.metrics.polysemanticity import (
    effective_features,
    feature_correlations,
    feature_dimensionality,
    mixedness,
    top_examples,
)
from sae_lib.metrics.probing import LinearProbe, linear_probe
from sae_lib.metrics.reconstruction import (
    Reconstruction,
    alive,
    cosine,
    dense,
    density,
    density_histogram,
    explained_variance,
    fvu,
    kl,
    l0,
    l2_ratio,
    loss_recovered,
    mse,
    relative_reconstruction_bias,
)
from sae_lib.metrics.recovery import (
    cosines,
    latent_f1,
    mcc,
    mmcs,
    orbit_cosines,
    orbit_mcc,
    orbit_mmcs,
    recovery_rate,
    uniqueness,
)
from sae_lib.metrics.sparse_probing import (
    SparseProbing,
    labelled_texts,
    pooled,
    sparse_probe_accuracy,
    strongest_latents,
)
from sae_lib.metrics.steering import Steered, Steering
from sae_lib.metrics.zipf import zipf_fit, zipf_shift
