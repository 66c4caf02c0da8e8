"""The report's words and tables, from the numbers of one run."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from neurode.report.page import Page
from neurode.studies.spirals.engines import ROUNDS
from neurode.studies.spirals.settings import LABELS, MODELS

# S. Mohapatra, "Deconstructing Neural ODEs from Scratch", part 3, for these models, sizes and settings, in percent.
PUBLISHED = {"ode-euler": 89.4, "ode-rk4": 90.9, "resnet": 92.9}


def percent(values: list[float]) -> str:
    """Mean in percent, with the spread over seeds where there are several."""
    mean = 100 * statistics.fmean(values)
    return f"{mean:.2f} %" + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def spread(values: list[float], unit: str = "") -> str:
    mean = statistics.fmean(values)
    return f"{mean:,.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "") + unit


def share(value: float) -> str:
    """A relative error: two digits of it in percent, or as a power of ten where it is small."""
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{100 * value:.0f} %" if value > 0.1 else f"{100 * value:.2g} %"


def plain(value: float) -> str:
    """A number with two digits, as a power of ten where it is far from 1."""
    return f"{value:.2g}" if 1e-2 < value < 1e3 else f"{value:.1e}"


def summary_rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of models, one row each."""
    rows = []
    network = results["models"]["resnet"]["parameters"]
    for name in MODELS:
        each = results["models"][name]
        counts = each["evaluations"]
        rows.append([
            LABELS[name], percent(each["train_accuracy"]), percent(each["test_accuracy"]), f"{PUBLISHED[name]} %", f"{each['parameters']:,}",
            f"{network / each['parameters']:.1f}" if name != "resnet" else "–", f"{counts[0]:,}" if counts[0] else "–", spread(each["seconds"], " s"),
            ", ".join(each["engines"]),
        ])  # fmt: skip
    return rows


HEAD = [
    "model",
    "training points",
    "fresh points",
    "published",
    "parameters",
    "times fewer",
    "calls of\u00a0f",
    "training",
    "engine",
]


def write(results: dict[str, Any], figures: dict[str, pathlib.Path]) -> Page:
    """The whole report."""
    page = Page(
        "The spiral classifier: neural ODEs against a residual network",
        "Three models, one data set, and every number measured in this run, but for the published ones beside them.",
    )
    for section in (models, orders, bridge, memory, adjoint, depth, inverse, crossing, pictures):
        section(page, results, figures)
    return page


def models(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    settings = results["settings"]
    page.section("1. What the models reach")
    page.text(
        f"Two interleaved Archimedean spirals, {settings['num_points']:,} noisy points; each model lifts them to six dimensions, moves them"
        f" ({settings['steps']} steps or blocks), and reads off the class. Adam at {settings['learning_rate']}, annealed along a cosine,"
        f" {settings['epochs']} epochs in batches of {settings['batch_size']}: {results['models']['ode-rk4']['updates'][0]:,} updates."
    )
    page.table(HEAD, summary_rows(results))
    bayes = 100 * results["bayes"]
    chance = (bayes * (100 - bayes) / settings["num_points"]) ** 0.5
    page.verdict(
        f"The best that any classifier reaches on fresh points of this data, in expectation, is {bayes:.2f} % (the Bayes accuracy, from the"
        " two class densities by numerical integration). On so few points as the training points even that classifier's score varies by"
        f" {chance:.1f} points from draw to draw; what lies further above is memory of the noise."
    )
    page.text(
        "The figures published for this benchmark (S. Mohapatra, Deconstructing Neural ODEs from Scratch, part 3) lie above that bound. If the"
        " angle is uniform and the noise on x and y independent, as here, no classifier reaches them on fresh points in expectation; they can"
        " be the accuracy on training points, or on few test points. The accuracy on fresh points here comes from"
        f" {settings['num_test']:,} points, whose sampling error is about {100 * (0.87 * 0.13 / settings['num_test']) ** 0.5:.2f} points."
    )
    if _underfitted(results):
        page.text(
            "The residual network is behind on its training points too: at this learning rate, the same for all three, its many"
            " layers are not fitted. Its row says what this setting reaches, not what a residual network can."
        )
    page.text(
        "Calls of f: evaluations of the vector field, counted by the solver in the forward passes of all updates (also through a"
        " resume)."
        f" {_spread_note(len(settings['seeds']))}"
    )
    page.figure(figures["loss"], "Training loss, first seed.")
    engines(page, results)


def engines(page: Page, results: dict[str, Any]) -> None:
    """What the training took, and what it takes on the other engine."""
    found, models = results["engines"], results["models"]
    total = sum(sum(models[name]["seconds"]) for name in MODELS) / len(results["settings"]["seeds"])
    refusals = {each["refusal"] for each in found.values() if "refusal" in each}
    if refusals:
        page.text(f"Training the three models took {total:.0f} s. The fused engine was not used: {refusals.pop()}")
        return
    rows = []
    for name, each in found.items():
        updates = models[name]["updates"][0]
        rows.append([
            LABELS[name], f"{each['eager']:.2f} ms", f"{each['fused']:.2f} ms", f"{each['eager'] / each['fused']:.1f}x",
            f"{each['eager'] * updates / 1000:.0f} s", f"{each['fused'] * updates / 1000:.0f} s",
        ])  # fmt: skip
    page.table(["an update on", "eager", "fused", "faster", f"x {updates:,} eager", f"x {updates:,} fused"], rows)
    network = sum(models["resnet"]["seconds"]) / len(results["settings"]["seeds"])
    before, after = (
        network + sum(each[engine] * models[name]["updates"][0] / 1000 for name, each in found.items())
        for engine in ("eager", "fused")
    )
    page.text(
        f"An update is forward, backward and Adam on one batch: the median of {ROUNDS} epochs on each engine in turn, in this run, after"
        " a first update that captures the field. The whole training of the three models, the residual network (PyTorch in both cases) at"
        f" its measured {network:.0f} s: {before:.0f} s by these figures with the neural ODEs on the eager engine, {after:.0f} s on the"
        f" fused one; the training of this report took {total:.0f} s by the clock. The engines differ by rounding: relative difference"
        f" of a trained model's outputs {max(each['outputs'] for each in found.values()):.0e}, of its gradients"
        f" {max(each['gradients'] for each in found.values()):.0e} in float32, and {max(each['outputs in float64'] for each in found.values()):.0e}"
        f" and {max(each['gradients in float64'] for each in found.values()):.0e} in float64. At the end of a training the gradient is a small"
        " sum of large terms, in which rounding shows."
    )


def _underfitted(results: dict[str, Any]) -> bool:
    """Whether the residual network's training accuracy is a point below the worse neural ODE's: not fitted, not overfitted."""
    means = {name: statistics.fmean(results["models"][name]["train_accuracy"]) for name in MODELS}
    return means["resnet"] < min(means["ode-euler"], means["ode-rk4"]) - 0.01


def _spread_note(seeds: int) -> str:
    rounding = (
        " At this learning rate a training can jump and settle elsewhere, and rounding decides which does: the same seed on"
        " another processor or engine may end ten points apart."
    )
    if seeds == 1:
        return "One seed: `--seeds 0 1 2` shows the spread." + rounding
    return f"Mean and standard deviation over {seeds} seeds." + rounding


def orders(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    page.section("2. Orders")
    page.text(
        "`y' = y cos t`, `y(0) = 1`, whose solution is `exp(sin t)`, solved to t = 2 in float64. A method of order p has an error in"
        " proportion to `h^p`: a straight line of slope p. The slopes are fitted to the four smallest steps."
    )
    page.figure(figures["orders"], "Error against step size, fitted slopes in the legend.")


def bridge(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    found = results["bridge"]
    page.section("3. A residual network is Euler's method")
    page.text(
        "`neurode.nn.as_resnet` turns a neural ODE on Euler's method into the residual network that it is: one block `y + h f(t, y)` a step."
        " Both were run on the training points with the trained field."
    )
    page.verdict(
        f"Largest difference of the outputs: {found['outputs']:g}. Largest difference of the gradients: {found['gradients']:g}."
    )
    if "fused outputs" in found:
        page.text(
            "That is on the eager engine, which performs the network's own operations. The fused engine adds the same numbers in another"
            f" order, and is apart by rounding: at most {found['fused outputs']:.1e} of the outputs and {found['fused gradients']:.1e} of the"
            " gradients, each relative to the largest entry of its tensor (float32)."
        )


def memory(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    found = results["memory"]
    page.section("4. Memory")
    page.text(
        "Peak live tensor storage over a forward and a backward pass, every storage counted once; parameters, their gradients, inputs and"
        " outputs are left out. `autograd` keeps every operation, `discrete` the state of every step (and takes steps again on the way"
        " back), `reversible` the last state of a scheme that can be run backward exactly, `continuous` the last state and the adjoint. Batch "
        f"{results['settings']['batch_size']}, the field of the classifier, float32, the eager engine."
    )
    rows = []
    for method, strategies in found["bytes"].items():
        for name, values in strategies.items():
            label = f"{'Euler' if method == 'euler' else 'RK4'}, `{name}`"
            growth = f"{values[-1] / values[0]:.1f}x"
            rows.append([label, f"{values[0] / 2**20:.2f} MiB", f"{values[-1] / 2**20:.2f} MiB", growth])
    first, last = found["steps"][0], found["steps"][-1]
    page.table(["solver, gradient", f"{first} steps", f"{last} steps", f"growth ({last // first}x the steps)"], rows)
    page.figure(figures["memory"], "Peak live storage against the number of steps.")


def adjoint(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    found = results["adjoint"]
    at = found["steps"].index(20) if 20 in found["steps"] else 0
    page.section("5. The adjoint's gradient")
    page.text(
        "The continuous adjoint needs memory that does not grow, and pays in exactness: it solves the state backward and differentiates the"
        " continuous problem, not the numbers that were computed. Relative error of its gradient (training loss, parameters of the field,"
        " float64) against the exact gradient of the same forward solve, with as many steps back as forward. Untrained means PyTorch's"
        " default initialization of every layer."
    )
    steps = found["steps"]
    rows = [
        [name.replace("euler", "Euler").replace("rk4", "RK4"), *map(share, found[name])]
        for name in found if name != "steps"
    ]  # fmt: skip
    page.table(["state, method", *(f"{n} steps" for n in steps)], rows)
    page.verdict(
        f"At {steps[at]} steps the adjoint's gradient is off by {share(found['untrained rk4'][at])} of its norm untrained and by"
        f" {share(found['trained rk4'][at])} trained with RK4; with Euler by {share(found['untrained euler'][at])} and"
        f" {share(found['trained euler'][at])}."
    )
    page.text(
        "More steps help only while the backward solve finds the states of the forward one. Where a trained flow contracts strongly, it cannot"
        " (section 7), and the error stays however small the step."
    )
    page.figure(figures["adjoint"], "Relative error of the continuous adjoint's gradient.")


def depth(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    found = results["depth"]
    page.section("6. Depth at test time")
    page.text(
        "A neural ODE can be solved with another step, or to a tolerance, without retraining. Whether it is then the same model is another"
        " question (Ott et al. 2020): training at a coarse step can make the step's error a part of the map. The deviation is the RMS distance"
        " of the model's output, at the steps it was trained with, from the accurately solved flow's, relative to how far the flow moves."
    )
    rows = []
    for name in ("ode-euler", "ode-rk4"):
        each = found[name]
        rows.append(
            [LABELS[name], *(f"{100 * a:.1f}" for a in each["accuracies"]), f"{100 * each['accuracy_exact']:.1f}"]
        )
    page.text(f"Accuracy here is on {found['ode-rk4']['num_points']:,} of the fresh points, solved in float64.")
    page.table(["test accuracy, %, at steps", *map(str, found["ode-rk4"]["steps"]), "1e-8"], rows)
    for name in ("ode-euler", "ode-rk4"):
        each = found[name]
        lost = 100 * (each["accuracy_trained"] - each["accuracy_exact"])
        verdict = "an ODE" if each["is_ode"] else "a residual network that depends on its step size"
        page.verdict(
            f"{LABELS[name]}: this model is {verdict}. Deviation {100 * each['deviation']:.2f} % (limit 1 %); solved accurately, its accuracy"
            f" {f'falls by {lost:.2f} points' if lost > 0.005 else f'rises by {-lost:.2f} points' if lost < -0.005 else 'stays'}."
        )
    page.figure(figures["depth"], "Test accuracy of the trained models at other depths.")
    page.text("`neurode.nn.check_depth(layer, data)` gives this verdict for any model of yours.")


def inverse(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    found = results["inverse"]
    page.section("7. Invertibility")
    page.text(
        "A flow is inverted by solving it backward; a discretization is only up to its error, and only where the flow does not contract beyond"
        " what floating-point numbers hold. The lifted training points are solved forward and back in float64, with the trained fields and with"
        " default-initialized ones."
    )
    page.figure(figures["inverse"], "Reconstruction error, relative to the size of the state.")
    last = found["steps"][-1]
    for name in ("ode-euler", "ode-rk4"):
        high, low = found[f"{name} singular values"]
        page.text(
            f"{LABELS[name]}, {last} steps each way: {plain(found[f'{name} untrained'][-1])} untrained, {plain(found[name][-1])} trained. The"
            f" singular values of the trained flow's derivative lie between {low:.0e} and {high:.1f}. Going back, an error in the most contracted"
            f" direction grows by {plain(1 / max(low, 1e-300))}: the rounding of float64 (1e-16) to {plain(1e-16 / max(low, 1e-300))} if nothing"
            " bounds it, and the solver's own error by as much."
        )
    if max(found[name][-1] for name in ("ode-euler", "ode-rk4")) > 0.01:
        page.verdict(
            "Invertible in principle is not invertible in numbers: a flow that was trained to classify may contract so far that nothing can bring"
            " the input back. Train with a regularizer, or check it, before you rely on the inverse."
        )
    else:
        page.verdict("These trained flows can be inverted: the lifted points come back to within 1 %.")


def crossing(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    line, disc, arms = results["reflection"], results["rings"], results["plane_spirals"]
    page.section("8. Trajectories do not cross")
    page.text(
        "Solutions of an ODE cannot meet. On the line a flow keeps the order of points, so `y -> -y` is out of reach; in the plane it cannot take"
        " a disc out of the ring around it. One more dimension makes both possible."
    )
    page.figure(figures["reflection"], "`y -> -y`, learned by a flow on the line and by one with a second dimension.")
    page.text(
        f"Neighbours that changed their order: {line['line']['crossings']} on the line, {line['augmented']['crossings']} with the second"
        f" dimension. Mean squared error: {line['line']['mse']:.3g} against {line['augmented']['mse']:.3g}."
    )
    page.figure(figures["rings"], "A disc and a ring, moved so that a straight line (a plane) separates them.")
    page.text(
        f"Accuracy on fresh points: {100 * disc['plane']['accuracy']:.1f} % in the plane, {100 * disc['augmented']['accuracy']:.1f} % with a third"
        " dimension. A flow in the plane cannot separate all of the disc from all of the ring; it can tear the ring open between the points"
        " that it was trained on. The largest stretching at 500 fresh points (spectral norm of the flow's derivative) is"
        f" {disc['plane']['stretch']:.0f} in the plane and {disc['augmented']['stretch']:.0f} with a third dimension."
    )
    page.text(
        "Two open spiral arms are not such a case in principle: a flow in the plane can unwind them. Measured after"
        f" {results['settings']['toy_updates']} updates, accuracy on fresh points: {100 * arms['plane']['accuracy']:.1f} % in the plane,"
        f" {100 * arms['augmented']['accuracy']:.1f} % with a third dimension (at best {100 * results['bayes']:.1f} %). What separates them is how"
        " easy it is to learn, not what is possible."
    )


def pictures(page: Page, results: dict[str, Any], figures: dict[str, pathlib.Path]) -> None:
    page.section("9. Pictures")
    page.figure(
        figures["boundaries"],
        "Decision boundaries over the training points, coloured by class; the shade is the probability of the second class.",
    )
    page.figure(
        figures["trajectories"],
        "Trajectories from t = 0 (black) to t = 1 (coloured by class) in the first two principal components of all states.",
    )
    page.figure(
        figures["flow"],
        "The flow of the neural ODE solved with RK4, in its first two principal components, coloured by class.",
    )
