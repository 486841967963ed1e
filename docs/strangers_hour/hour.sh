#!/usr/bin/env bash
# From a downloaded state dict to a report; suspect/ is what train_suspect.py wrote.
set -u
network=(--architecture torchvision:resnet18 --mean 0.5 --std 0.5
         --weights suspect/suspect.safetensors)
# in logit order, which is not that of the alphabet
classes="T-shirt or top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

sklearn-backdoor convert suspect/suspect.pt suspect/suspect.safetensors || exit
sklearn-backdoor guard fit "${network[@]}" --images suspect/clean \
    --classes "$classes" --out guard --checkpoint-dir search
[ $? -eq 1 ] || exit  # 1: backdoored, and a guard is there
sklearn-backdoor guard check guard suspect/incoming "${network[@]}" --csv verdicts.csv
sklearn-backdoor report guard "${network[@]}" --images suspect/clean \
    --classes "$classes" --check suspect/incoming --out report.html
