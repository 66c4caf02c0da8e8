"""Classify two interleaved spirals with a neural ODE, and ask whether the trained model is an ODE.

Run: python examples/spiral_classifier.py [epochs]
"""

import sys

import torch
from torch import nn

import neurode
from neurode.data import bayes_accuracy, spirals

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
torch.manual_seed(0)
points, labels = spirals(1000)
fresh, fresh_labels = spirals(20_000)

# Lift the plane to six dimensions, flow along a learned field, read off the class.
flow = neurode.nn.NeuralODE(neurode.nn.MLP(6, (64, 64)), method="rk4", steps=10)
lift, head = neurode.nn.Lift(2, 6), nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
model = nn.Sequential(lift, flow, head)

optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in range(epochs):
    for batch in torch.randperm(len(points)).split(128):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    schedule.step()
    if (epoch + 1) % 25 == 0:
        print(f"epoch {epoch + 1:3}  loss of the last batch {loss.item():.3f}")

with torch.no_grad():
    accuracy = (model(fresh).argmax(1) == fresh_labels).double().mean().item()
print(f"accuracy on fresh points {accuracy:.1%}; no classifier reaches more than {bayes_accuracy():.2%}")

# Another depth needs no retraining. Whether it is the same model is a question worth asking.
print(neurode.nn.check_depth(flow, lift(points).detach()))
