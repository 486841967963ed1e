"""Rival in-flight detectors, with one interface."""

from sklearn_backdoor.detectors._b3d import B3DDetector
from sklearn_backdoor.detectors._ibd_psc import IBDPSCDetector
from sklearn_backdoor.detectors._nc_activation import NCActivationDetector
from sklearn_backdoor.detectors._patcher import NCPatcher
from sklearn_backdoor.detectors._scale_up import SCALEUPDetector
from sklearn_backdoor.detectors._strip import STRIPDetector

__all__ = [
    "B3DDetector",
    "IBDPSCDetector",
    "NCActivationDetector",
    "NCPatcher",
    "SCALEUPDetector",
    "STRIPDetector",
]
