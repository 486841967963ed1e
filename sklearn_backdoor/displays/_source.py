"""What displays take from a fitted estimator, and what they refuse."""

from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._validation import check_target_class


def defended_class(guard, target_class):
    """Return the target class that a picture of a guard is about.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    target_class : label or None
        None takes the most anomalous one that is defended.

    Returns
    -------
    label

    Raises
    ------
    TypeError
        If it is no guard.
    ValueError
        If no class, or not this one, is defended.
    """
    if not hasattr(guard, "inspect"):
        raise TypeError(
            f"estimator has type {type(guard).__name__}, expected a fitted "
            "BackdoorGuard. Use from_predictions for what another defence says."
        )
    check_is_fitted(guard)
    if target_class is not None:
        check_target_class(target_class, guard.classes_)
    if len(guard.target_classes_) == 0:
        raise ValueError(
            f"the guard defends no class (verdict: {guard.verdict_!r}), so it judges "
            "no image. To see one defended all the same, fit "
            "BackdoorGuard(victim, target_class=...)."
        )
    if target_class is None:
        return guard.target_class_
    if target_class not in guard.triggers_:
        raise ValueError(
            f"target_class={target_class} is not defended; the guard defends "
            f"{guard.target_classes_.tolist()}. Choose one of these."
        )
    return target_class


def search_of(estimator):
    """Return the finished search of a reverse engineer, a guard or an embedder.

    Parameters
    ----------
    estimator : reverse engineer, SearchRecord, BackdoorGuard or TriggerEmbedder
        Fitted.

    Returns
    -------
    reverse engineer or SearchRecord

    Raises
    ------
    TypeError
        If it is none of these.
    ValueError
        If the trigger was given, so that nothing was searched.
    """
    if hasattr(estimator, "fit"):  # a record is finished from the start
        check_is_fitted(estimator)
    search = getattr(estimator, "engineer_", estimator)
    if search is None:
        raise ValueError(
            f"this {type(estimator).__name__} was given its trigger, so no search "
            "compared the classes. Fit it with a reverse engineer as trigger, or give "
            "a fitted reverse engineer."
        )
    if not hasattr(search, "p_values_"):
        raise TypeError(
            f"estimator has type {type(estimator).__name__}, expected a fitted reverse "
            "engineer or guard, such as AutoReverseEngineer(victim).fit(X, y)."
        )
    return search
