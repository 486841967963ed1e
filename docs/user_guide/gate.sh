#!/bin/sh
# A gate in a release pipeline: gate.sh WEIGHTS CLEAN_IMAGES
# Ends with 0 if the release may go on, 1 if it is stopped, 2 if a person has to look.
weights=$1
images=$2

sklearn-backdoor scan --architecture "${ARCHITECTURE:-resnet18}" \
    --weights "$weights" --images "$images" \
    --checkpoint-dir gate/search --out gate --json gate/verdict.json \
    --report gate/report.html
status=$?

case $status in
    0) echo "gate: nothing found, release (not proof of being clean)" ;;
    1) echo "gate: backdoor found, stopped: see gate/report.html" >&2; exit 1 ;;
    2) echo "gate: input unreadable or unsafe, stopped" >&2; exit 1 ;;
    4) echo "gate: inconclusive, a person has to look" >&2; exit 2 ;;
    *) echo "gate: the scan itself failed ($status), try again or file it" >&2; exit 2 ;;
esac
