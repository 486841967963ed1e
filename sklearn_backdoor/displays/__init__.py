"""Pictures of what was found, in scikit-learn's idiom."""

from sklearn_backdoor.displays._anomaly_index import AnomalyIndexDisplay
from sklearn_backdoor.displays._feature_space import FeatureSpaceDisplay
from sklearn_backdoor.displays._likelihood_ratio import LikelihoodRatioDisplay
from sklearn_backdoor.displays._source_confusion import SourceConfusionDisplay
from sklearn_backdoor.displays._trigger import TriggerDisplay

__all__ = [
    "AnomalyIndexDisplay",
    "FeatureSpaceDisplay",
    "LikelihoodRatioDisplay",
    "SourceConfusionDisplay",
    "TriggerDisplay",
]
