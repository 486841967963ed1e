"""Detect backdoor triggers in flight and infer where the image came from."""

from sklearn_backdoor.attacks import poison
from sklearn_backdoor.classifier import BackdoorTriggerClassifier
from sklearn_backdoor.detectors import (
    B3DDetector,
    IBDPSCDetector,
    NCActivationDetector,
    NCPatcher,
    SCALEUPDetector,
    STRIPDetector,
)
from sklearn_backdoor.displays import (
    AnomalyIndexDisplay,
    FeatureSpaceDisplay,
    LikelihoodRatioDisplay,
    SourceConfusionDisplay,
    TriggerDisplay,
)
from sklearn_backdoor.embedding import TriggerEmbedder
from sklearn_backdoor.guard import BackdoorGuard
from sklearn_backdoor.metrics import (
    asr_score,
    detection_report,
    fpr_score,
    make_trigger_scorer,
    origin_log_loss,
    sia_score,
    tpr_score,
)
from sklearn_backdoor.reverse import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    B3DReverseEngineer,
    BatchNormReverseEngineer,
    NCReverseEngineer,
    NeuronReverseEngineer,
    TABORReverseEngineer,
    WeightReverseEngineer,
)
from sklearn_backdoor.triggers import (
    AdditiveTrigger,
    PatchTrigger,
    blended,
    chessboard,
    single_pixel,
    white_box,
)
from sklearn_backdoor.victim import VictimNetwork

__version__ = "0.1.0"

__all__ = [
    "AdditiveReverseEngineer",
    "AdditiveTrigger",
    "AnomalyIndexDisplay",
    "AutoReverseEngineer",
    "B3DDetector",
    "B3DReverseEngineer",
    "BackdoorGuard",
    "BackdoorTriggerClassifier",
    "BatchNormReverseEngineer",
    "FeatureSpaceDisplay",
    "IBDPSCDetector",
    "LikelihoodRatioDisplay",
    "NCActivationDetector",
    "NCPatcher",
    "NCReverseEngineer",
    "NeuronReverseEngineer",
    "PatchTrigger",
    "SCALEUPDetector",
    "STRIPDetector",
    "SourceConfusionDisplay",
    "TABORReverseEngineer",
    "TriggerDisplay",
    "TriggerEmbedder",
    "VictimNetwork",
    "WeightReverseEngineer",
    "asr_score",
    "blended",
    "chessboard",
    "detection_report",
    "fpr_score",
    "make_trigger_scorer",
    "origin_log_loss",
    "poison",
    "sia_score",
    "single_pixel",
    "tpr_score",
    "white_box",
]
