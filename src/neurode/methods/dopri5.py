"""Dormand and Prince's pair: order 5(4), seven stages, FSAL, 4th-order dense output."""

from neurode.methods.tableau import ButcherTableau, exact

dopri5 = ButcherTableau(
    name="dopri5",
    order=5,
    a=(
        (),
        exact("1/5"),
        exact("3/40 9/40"),
        exact("44/45 -56/15 32/9"),
        exact("19372/6561 -25360/2187 64448/6561 -212/729"),
        exact("9017/3168 -355/33 46732/5247 49/176 -5103/18656"),
        exact("35/384 0 500/1113 125/192 -2187/6784 11/84"),
    ),
    b=exact("35/384 0 500/1113 125/192 -2187/6784 11/84 0"),
    c=exact("0 1/5 3/10 4/5 8/9 1 1"),
    b_error=exact("71/57600 0 -71/16695 71/1920 -17253/339200 22/525 -1/40"),
    order_error=4,
    # Shampine (1986), p. 148: the quartic of least truncation error, in powers of theta.
    dense=(
        exact("1 -8048581381/2820520608 8663915743/2820520608 -12715105075/11282082432"),
        exact("0 0 0 0"),
        exact("0 131558114200/32700410799 -68118460800/10900136933 87487479700/32700410799"),
        exact("0 -1754552775/470086768 14199869525/1410260304 -10690763975/1880347072"),
        exact("0 127303824393/49829197408 -318862633887/49829197408 701980252875/199316789632"),
        exact("0 -282668133/205662961 2019193451/616988883 -1453857185/822651844"),
        exact("0 40617522/29380423 -110615467/29380423 69997945/29380423"),
    ),
    dense_order=4,
    source="J. R. Dormand, P. J. Prince (1980), A family of embedded Runge-Kutta formulae, J. Comput. Appl. "
    "Math. 6, 19-26, table 2; dense output: L. F. Shampine (1986), Some practical Runge-Kutta formulas, "
    "Math. Comp. 46, 135-150",
)
