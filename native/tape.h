// Whole steps of tiny systems as tapes: for every stage the combination of the stages before and the lines of f, on rows whose
// addresses are found once a solve. Nothing is copied, and all of it stays in the first-level cache.
#pragma once
#include "line_kernels.h"
#include "workspace.h"

namespace NEURODE_NAMESPACE {

using neurode::Line;
using neurode::LineRow;
using neurode::Straight;

// Where the rows of one stage begin; T numbers a row.
template <class R> struct StageRows {
    const R *time = nullptr, *state = nullptr, *data = nullptr;
    R* out = nullptr;
    R *kept = nullptr, *cotangent = nullptr, *grad = nullptr, *grad_data = nullptr, *sums = nullptr; // of the way back
};

// What all tapes of a solve share: rows for what is in between, and uniform numbers spread over a row where a line needs that.
template <class R> struct TapeRows {
    R *spare, *numbers;
    int32_t* number_at; // for every row of `numbers`: which
    int num_numbers = 0;

    TapeRows(const Straight& code, int T, Workspace& work)
        : spare(work.take<R>(size_t(code.num_spare) * T)), numbers(work.take<R>(size_t(code.num_uniform) * T)),
          number_at(work.take<int32_t>(code.num_uniform)) {}
    static size_t bytes(const Straight& code, int T) {
        return Workspace::size_of<R>(size_t(code.num_spare) * T) + Workspace::size_of<R>(size_t(code.num_uniform) * T) +
               Workspace::size_of<int32_t>(code.num_uniform);
    }
    const R* number(const R* u, int32_t index, int T) {
        int i = 0;
        while (i < num_numbers && number_at[i] != index) i++;
        R* row = numbers + ptrdiff_t(i) * T;
        if (i == num_numbers) {
            number_at[num_numbers++] = index;
            for (int l = 0; l < T; l++) row[l] = u[index];
        }
        return row;
    }
};

template <class R> class Tape {
    typedef typename Entry<R>::Term Term;

  public:
    Tape(int T, const R* u, TapeRows<R>& rows, size_t entries, size_t terms, Workspace& work)
        : T_(T), u_(u), rows_(rows), entries_(work.take<Entry<R>>(entries)), terms_(work.take<Term>(terms)) {}
    static size_t bytes(size_t entries, size_t terms) {
        return Workspace::size_of<Entry<R>>(entries) + Workspace::size_of<Term>(terms);
    }

    // out = add + scale sum_j w(j) x(j) for j < n, without the terms whose weight is zero; `add`, `scale` may be null.
    template <class Weight, class Row> void combine(R* out, const R* add, const R* scale, int n, Weight w, Row x) {
        Entry<R>& e = entries_[size_++];
        e = {nullptr, out, add, scale, nullptr, terms_, nullptr, 0, T_};
        for (int j = 0; j < n; j++)
            if (w(j) != 0) *terms_++ = {x(j), R(w(j))}, e.count++;
        if (!e.count) return copy(e);
        e.run = scale ? (add ? combination_for<R, true, true>(e.count) : combination_for<R, true, false>(e.count))
                      : (add ? combination_for<R, false, true>(e.count) : combination_for<R, false, false>(e.count));
    }
    void lines(const std::vector<Line>& list, const StageRows<R>& at) {
        for (const Line& line : list) add(line, at);
    }
    int size() const { return size_; }
    void run(int first, int last) const {
        for (const Entry<R>*e = entries_ + first, *end = entries_ + last; e != end; e++) e->run(*e);
    }

  private:
    void copy(Entry<R>& e) { // a combination of nothing
        static const R zero = 0;
        e.run = row_kernel<R>(COPY, e.a ? 0 : 1, T_ / LANES<R>);
        if (!e.a) e.a = &zero;
    }
    R* row(const LineRow& x, const StageRows<R>& at) const {
        auto of = [&](R* base) { return base + ptrdiff_t(x.index) * T_; };
        switch (x.kind) {
        case LineRow::TIME: return const_cast<R*>(at.time);
        case LineRow::STATE: return of(const_cast<R*>(at.state));
        case LineRow::DATA: return of(const_cast<R*>(at.data));
        case LineRow::SPARE: return of(rows_.spare);
        case LineRow::OUT: return of(at.out);
        case LineRow::KEPT: return of(at.kept);
        case LineRow::COTANGENT: return of(at.cotangent);
        case LineRow::GRAD: return of(at.grad);
        case LineRow::GRAD_DATA: return of(at.grad_data);
        case LineRow::SUM: return of(at.sums);
        default: return nullptr;
        }
    }
    void add(const Line& line, const StageRows<R>& at) {
        const LineRow* x[3] = {&line.operands[0], &line.operands[1], &line.operands[2]};
        auto is_number = [&](int k) { return x[k]->kind == LineRow::NUMBER; };
        bool turns = line.op == ADD || line.op == MUL || line.op == FMA || line.op == FNMA || line.op == neurode::FMS;
        if (turns && is_number(0) && !is_number(1)) std::swap(x[0], x[1]); // kernels have the number second
        int one = 0;
        for (int k = 0; k < 3; k++) one |= int(is_number(k)) << k;
        Kernel<R> kernel = row_kernel<R>(line.op, one, T_ / LANES<R>);
        if (!kernel) kernel = row_kernel<R>(line.op, one = 0, T_ / LANES<R>);
        const R* operands[3];
        for (int k = 0; k < 3; k++)
            operands[k] = !is_number(k) ? row(*x[k], at) : one >> k & 1 ? u_ + x[k]->index : rows_.number(u_, x[k]->index, T_);
        entries_[size_++] = {kernel ? kernel : row_by_micro<R>, row(line.out, at), operands[0], operands[1], operands[2], nullptr,
                             kernel ? nullptr : micro<R>(line.op), 0, T_};
    }

    int T_, size_ = 0;
    const R* u_;
    TapeRows<R>& rows_;
    Entry<R>* entries_;
    Term* terms_;
};

// Rows of one step: the state at its start and its end, the stages, the samples' data.
template <class R> struct Frame {
    R *y, *y1, *k, *rowdata;
};

// The way forward through one step on one frame.
template <class R> class StepTape {
  public:
    // What the tapes of several frames share.
    struct Shared {
        TapeRows<R> rows;
        R *state, *time;
        Shared(const Straight& code, int D, int T, Workspace& work)
            : rows(code, T, work), state(work.take<R>(size_t(D) * T)), time(work.take<R>(T)) {}
        static size_t bytes(const Straight& code, int D, int T) {
            return TapeRows<R>::bytes(code, T) + Workspace::size_of<R>(size_t(D) * T) + Workspace::size_of<R>(T);
        }
    };

    template <class Method>
    StepTape(const Straight& code, const R* u, const Method& m, int D, int T, const Frame<R>& frame, const R* h, Shared& shared,
             Workspace& work)
        : reads_time(code.reads_time), time(shared.time), tape_(T, u, shared.rows, entries(code, D, m.all), terms(D, m.all), work),
          begin_(work.take<int>(m.all + 3)) {
        ptrdiff_t N = ptrdiff_t(D) * T;
        StageRows<R> at;
        at.time = shared.time, at.data = frame.rowdata;
        auto combine = [&](R* to, int n, auto weight) {
            for (int d = 0; d < D; d++)
                tape_.combine(to + d * T, frame.y + d * T, h, n, weight, [&](int j) { return frame.k + j * N + d * T; });
        };
        for (int i = 0; i < m.all; i++) {
            begin_[i] = tape_.size();
            bool at_start = m.is_start(i), at_end = m.fsal && i == m.stages - 1;
            R* state = at_end ? frame.y1 : at_start ? frame.y : shared.state;
            if (!at_start || at_end) combine(state, i, [&](int j) { return m.a(i, j); });
            at.state = state, at.out = frame.k + i * N;
            tape_.lines(code.forward, at);
        }
        begin_[m.all] = tape_.size();
        combine(frame.y1, m.stages, [&](int j) { return m.b(j); });
        begin_[m.all + 1] = tape_.size();
        combine(shared.state, 1, [](int) { return 1.0; });
        at.state = shared.state, at.out = frame.y1;
        tape_.lines(code.forward, at);
        begin_[m.all + 2] = tape_.size();
        all_ = m.all;
    }
    static size_t bytes(const Straight& code, int D, int all) {
        return Tape<R>::bytes(entries(code, D, all), terms(D, all)) + Workspace::size_of<int>(all + 3);
    }

    void stage(int i) const { tape_.run(begin_[i], begin_[i + 1]); }
    void finish() const { stage(all_); }     // y1 = y + h sum_j b_j k_j
    void trial() const { stage(all_ + 1); }  // f after an Euler step, to y1

    const bool reads_time;
    R* const time; // of the stage, to be written before it where it is read

  private:
    static size_t entries(const Straight& code, int D, int all) {
        return size_t(all + 2) * D + size_t(all + 1) * code.forward.size();
    }
    static size_t terms(int D, int all) { return size_t(D) * (size_t(all) * (all - 1) / 2 + all + 1); }

    Tape<R> tape_;
    int* begin_;
    int all_;
};

// The way back through one step on one frame: its stages again, each with what its vector-Jacobian product reads, and then these
// products from the last one on. The cotangent of a stage is gathered from what the state at the end and the stages behind it gave.
template <class R> class BackTape {
  public:
    // Rows of all stages, one stage after the other, which the tapes of a frame share; and what it gives and takes.
    struct Rows {
        TapeRows<R> shared;
        R *states, *times, *kept, *grads, *sums;
        Rows(const Straight& code, int D, int T, int all, Workspace& work)
            : shared(code, T, work), states(work.take<R>(size_t(D) * T * all)), times(work.take<R>(size_t(T) * all)),
              kept(work.take<R>(size_t(code.num_kept) * T * all)), grads(work.take<R>(size_t(D) * T * all)),
              sums(work.take<R>(code.accumulators.size() * T)) {}
        static size_t bytes(const Straight& code, int D, int T, int all) {
            return TapeRows<R>::bytes(code, T) + 2 * Workspace::size_of<R>(size_t(D) * T * all) +
                   Workspace::size_of<R>(size_t(T) * all) + Workspace::size_of<R>(size_t(code.num_kept) * T * all) +
                   Workspace::size_of<R>(code.accumulators.size() * T);
        }
    };
    // Cotangents: of the stages (outputs inside the step gave them, where `outputs`; then the tape), of the state at the start from
    // such outputs, of the state at the end (afterwards: at the start), of the sample's data.
    struct Cotangents {
        R *stages, *start, *end, *data;
    };

    template <class Method>
    BackTape(const Straight& code, const R* u, const Method& m, int num_stages, bool outputs, int D, int T, const Frame<R>& frame,
             const R* h, const Cotangents& g, Rows& rows, Workspace& work)
        : num_stages(num_stages), reads_time(code.reads_time),
          tape_(T, u, rows.shared, entries(code, D, num_stages), terms(D, num_stages), work), T_(T), times_(rows.times) {
        ptrdiff_t N = ptrdiff_t(D) * T;
        auto by_feature = [&](auto combine) {
            for (int d = 0; d < D; d++) combine(d * T);
        };
        auto at = [&](int i, R* state) {
            StageRows<R> rows_of;
            rows_of.time = rows.times + ptrdiff_t(i) * T, rows_of.state = state, rows_of.data = frame.rowdata;
            rows_of.out = frame.k + i * N, rows_of.kept = rows.kept + ptrdiff_t(i) * code.num_kept * T;
            rows_of.cotangent = g.stages + i * N, rows_of.grad = rows.grads + i * N;
            rows_of.grad_data = g.data, rows_of.sums = rows.sums;
            return rows_of;
        };
        auto state_of = [&](int i) { return m.is_start(i) ? frame.y : rows.states + i * N; };
        for (int i = 0; i < num_stages; i++) {
            if (!m.is_start(i))
                by_feature([&](ptrdiff_t d) {
                    tape_.combine(state_of(i) + d, frame.y + d, h, i, [&](int j) { return m.a(i, j); },
                                  [&](int j) { return frame.k + j * N + d; });
                });
            tape_.lines(code.forward, at(i, state_of(i)));
        }
        for (int i = num_stages - 1; i >= 0; i--) {
            auto weight = [&](int j) { return j < num_stages ? (j > i ? m.a(j, i) : 0) : i < m.stages ? m.b(i) : 0; };
            by_feature([&](ptrdiff_t d) {
                auto given = [&](int j) { return j < num_stages ? rows.grads + j * N + d : g.end + d; };
                R* to = g.stages + i * N + d;
                tape_.combine(to, outputs ? to : nullptr, h, num_stages + 1, weight, given);
            });
            tape_.lines(code.backward, at(i, state_of(i)));
        }
        by_feature([&](ptrdiff_t d) {
            auto given = [&](int j) { return j < num_stages ? rows.grads + j * N + d : g.start + d; };
            tape_.combine(g.end + d, g.end + d, nullptr, num_stages + outputs, [](int) { return 1.0; }, given);
        });
    }
    static size_t bytes(const Straight& code, int D, int num_stages) {
        return Tape<R>::bytes(entries(code, D, num_stages), terms(D, num_stages));
    }

    R* time(int stage) const { return times_ + ptrdiff_t(stage) * T_; } // to be written first where it is read
    void run() const { tape_.run(0, tape_.size()); }

    const int num_stages;
    const bool reads_time;

  private:
    static size_t entries(const Straight& code, int D, int n) {
        return size_t(n) * (2 * D + code.forward.size() + code.backward.size()) + D;
    }
    static size_t terms(int D, int n) { return size_t(D) * (size_t(n) * n + 2 * n + 1); }

    Tape<R> tape_;
    int T_;
    R* times_;
};

} // namespace NEURODE_NAMESPACE
