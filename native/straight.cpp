// Flattens a program's sections row by row into a straight list, and simplifies it.
#include "straight.h"

#include <cstddef>
#include <iterator>
#include <map>
#include <tuple>
#include <utility>

namespace neurode {
namespace {

using std::size_t;

constexpr size_t MOST_LINES = 256;  // operations on rows: beyond, instructions over many rows waste little
constexpr int MOST_STATE = 64;      // features, and numbers of a sample's own data
constexpr int MOST_PRODUCT = 16;    // numbers of a matrix that becomes single products

class Flattener {
  public:
    Flattener(const Program& program, Straight& to) : p_(program), to_(to) {}

    bool run() {
        if (p_.size > MOST_STATE || p_.num_rowdata > MOST_STATE) return false;
        if (!section(p_.forward) || !rows_at(p_.out, p_.size, to_.out)) return false;
        if (!p_.backward.size && !p_.grad_y.present()) return true;
        for (auto at = rows_.begin(); at != rows_.end();) // scratch rows of the forward section are gone
            at = at->first >> SPACE_SHIFT == SCRATCH ? rows_.erase(at) : std::next(at);
        if (!section(p_.backward)) return false;
        if (p_.grad_y.present() && !rows_at(p_.grad_y, p_.size, to_.grad_y)) return false;
        if (p_.grad_rowdata.present() && !rows_at(p_.grad_rowdata, p_.num_rowdata, to_.grad_rowdata)) return false;
        std::vector<int32_t> time;
        if (p_.grad_t.present()) {
            if (!rows_at(p_.grad_t, 1, time)) return false;
            to_.grad_t = time[0];
        }
        return sums();
    }

  private:
    static int32_t reference(int space, int row) { return space << SPACE_SHIFT | row; }

    // The value that a row holds now; -1 where nothing has written it.
    int32_t value(int32_t ref) {
        auto known = rows_.find(ref);
        if (known != rows_.end()) return known->second;
        int space = ref >> SPACE_SHIFT, row = ref & ROW_MASK;
        bool given = space == UNIFORM || space == ROWDATA || (space == SAVED && row <= p_.size) ||
                     (space == COTANGENT && row < p_.size);
        return given ? rows_[ref] = push(Straight::LEAF, space, row, -1) : -1;
    }
    bool rows_at(Place at, int n, std::vector<int32_t>& to) {
        for (int i = 0; i < n; i++) to.push_back(value(reference(at.space, at.row + i)));
        for (int32_t v : to)
            if (v < 0) return false;
        return true;
    }
    void write(Place at, int i, int32_t v) { rows_[reference(at.space, at.row + i)] = v; }

    int32_t push(int32_t op, int32_t a, int32_t b, int32_t c) {
        auto [at, fresh] = known_.try_emplace(std::make_tuple(op, a, b, c), int32_t(to_.values.size()));
        if (fresh) to_.values.push_back({op, a, b, c});
        return at->second;
    }
    bool negative(int32_t v) const { return to_.is(v, NEG); }
    int32_t inside(int32_t v) const { return to_.values[v].a; }

    // The value of an operation. What is rewritten here gives the same bits.
    int32_t emit(int32_t op, int32_t a, int32_t b = -1, int32_t c = -1) {
        if (op == COPY) return a;
        if (op == NEG && negative(a)) return inside(a);
        if ((op == MUL || op == DIV) && negative(a)) return emit(NEG, emit(op, inside(a), b));
        if ((op == MUL || op == DIV) && negative(b)) return emit(NEG, emit(op, a, inside(b)));
        if (op == ADD && negative(b)) return emit(SUB, a, inside(b));
        if (op == ADD && negative(a)) return emit(SUB, b, inside(a));
        if (op == SUB && negative(b)) return emit(ADD, a, inside(b));
        if ((op == ADD || op == MUL) && a > b) std::swap(a, b);
        return push(op, a, b, c);
    }

    bool section(const Section& section) {
        for (const Instruction& i : section) {
            bool known = false;
            switch (i.opcode) {
            case POINTWISE: known = pointwise(i); break;
            case REDUCE: known = reduce(i); break;
            case SAMPLE_PRODUCT: known = sample_product(i); break;
            case GEMM: known = product(i); break;
            default: break;
            }
            if (!known || to_.values.size() > 2 * MOST_LINES) return false;
        }
        return true;
    }

    bool pointwise(const Instruction& i) {
        if (int64_t(i.n) * i.num_steps > int64_t(2 * MOST_LINES)) return false;
        for (int row = 0; row < i.n; row++) {
            std::vector<int32_t> registers;
            for (int k = 0; k < i.num_inputs; k++) {
                registers.push_back(value(i.inputs[k].ref(row)));
                if (registers.back() < 0) return false;
            }
            auto operand = [&](const Chain& s, int k, int r) { return k < arity_of(s.micro) ? registers[r] : -1; };
            for (int s = 0; s < i.num_steps; s++) {
                const Chain& step = i.steps[s];
                registers.push_back(emit(step.micro, operand(step, 0, step.a), operand(step, 1, step.b), operand(step, 2, step.c)));
            }
            for (int k = 0; k < i.num_outputs; k++) write(i.outputs[k].at, row, registers[i.outputs[k].reg]);
        }
        return true;
    }

    bool reduce(const Instruction& i) {
        static const int ops[] = {ADD, MAX, MIN, MUL};
        if (i.kind < 0 || i.kind > 3 || i.m < 1 || int64_t(i.n) * i.m > int64_t(MOST_LINES)) return false;
        for (int k = 0; k < i.n; k++) {
            int32_t sum = value(i.x.ref(k * i.m));
            for (int j = 1; j < i.m && sum >= 0; j++) {
                int32_t next = value(i.x.ref(k * i.m + j));
                sum = next < 0 ? -1 : emit(ops[i.kind], sum, next);
            }
            if (sum < 0) return false;
            write(i.out, k, sum);
        }
        return true;
    }

    // sum_k x_k z_k, from `sum` on (-1: nothing).
    template <class X, class Z> int32_t dot(int n, X x, Z z, int32_t sum) {
        for (int k = 0; k < n; k++) {
            int32_t a = x(k), b = z(k);
            if (a < 0 || b < 0) return -1;
            sum = sum < 0 ? emit(MUL, a, b) : emit(FMA, a, b, sum);
        }
        return sum;
    }

    bool sample_product(const Instruction& i) {
        if (int64_t(i.count) * i.O * i.K * i.J > int64_t(MOST_LINES) || i.K < 1) return false;
        for (int b = 0; b < i.count; b++)
            for (int r = 0; r < i.O; r++)
                for (int j = 0; j < i.J; j++) {
                    auto x = [&](int k) { return value(i.x.ref((b * i.O + r) * i.K + k)); };
                    auto z = [&](int k) { return value(i.z.ref((b * i.K + k) * i.J + j)); };
                    int32_t sum = dot(i.K, x, z, -1);
                    if (sum < 0) return false;
                    write(i.out, (b * i.O + r) * i.J + j, sum);
                }
        return true;
    }

    bool product(const Instruction& i) {
        if (int64_t(i.O) * i.K > MOST_PRODUCT || int64_t(i.count) * i.O * i.K > int64_t(MOST_LINES) || i.K < 1) return false;
        for (int c = 0; c < i.count; c++)
            for (int o = 0; o < i.O; o++) {
                auto x = [&](int k) { return value(i.x.ref(c * i.K + k)); };
                auto w = [&](int k) { return value(reference(UNIFORM, i.weight + o * i.weight_o + k * i.weight_k)); };
                int32_t sum = i.bias < 0 ? -1 : value(reference(UNIFORM, i.bias + o * i.bias_o));
                sum = dot(i.K, x, w, sum);
                if (sum >= 0 && !i.add.absent()) {
                    int32_t more = value(i.add.ref(c * i.O + o));
                    sum = more < 0 ? -1 : emit(ADD, sum, more);
                }
                int32_t aux = i.aux.absent() ? -1 : value(i.aux.ref(c * i.O + o));
                if (sum < 0 || (arity_of(i.act) == 2 && aux < 0) || arity_of(i.act) > 2) return false;
                write(i.out, c * i.O + o, emit(i.act, sum, arity_of(i.act) == 2 ? aux : -1));
            }
        return true;
    }

    bool sums() {
        auto add = [&](int32_t acc, int32_t g, int32_t x, bool pair) {
            to_.sums.push_back({acc, g, x});
            return g >= 0 && (!pair || x >= 0) && to_.sums.size() <= MOST_LINES;
        };
        for (const Instruction& i : p_.gradient) {
            if (i.opcode == RGRAD) {
                for (int k = 0; k < i.n; k++)
                    for (int j = 0; j < i.m; j++)
                        if (!add(i.acc + k, value(i.x.ref(k * i.m + j)), -1, false)) return false;
                continue;
            }
            if (i.opcode != WGRAD || int64_t(i.O) * i.K > MOST_PRODUCT) return false;
            for (int c = 0; c < i.count; c++)
                for (int o = 0; o < i.O; o++)
                    for (int k = 0; k < i.K; k++)
                        if (!add(i.acc + o * i.acc_o + k * i.acc_k, value(i.x.ref(c * i.O + o)), value(i.z.ref(c * i.K + k)), true))
                            return false;
        }
        return true;
    }

    const Program& p_;
    Straight& to_;
    std::map<int32_t, int32_t> rows_;
    std::map<std::tuple<int32_t, int32_t, int32_t, int32_t>, int32_t> known_;
};

// How often a value is read on the way to dy/dt, or to that and all cotangents and sums.
std::vector<int> count_uses(const Straight& s, bool all) {
    std::vector<int> uses(s.values.size());
    auto use = [&](int32_t v) { v >= 0 ? void(uses[v]++) : void(); };
    for (int32_t v : s.out) use(v);
    if (all) {
        for (int32_t v : s.grad_y) use(v);
        for (int32_t v : s.grad_rowdata) use(v);
        use(s.grad_t);
        for (const Straight::Sum& sum : s.sums) use(sum.g), use(sum.x);
    }
    for (size_t i = s.values.size(); i-- > 0;) { // what nobody reads reads nothing
        const Straight::Value& v = s.values[i];
        if (v.op == Straight::LEAF || !uses[i]) continue;
        const int32_t operands[3] = {v.a, v.b, v.c};
        for (int k = 0; k < Straight::arity(v.op); k++) use(operands[k]);
    }
    return uses;
}

// A product that only a sum reads is computed with it, rounded once where the processor can. `skip`: values to leave alone.
void join_products(Straight& s, const std::vector<int>& uses, const std::vector<int>& skip) {
    auto joins = [&](int32_t v) { return s.is(v, MUL) && uses[v] == 1 && !skip[v]; };
    for (size_t i = 0; i < s.values.size(); i++) {
        Straight::Value& v = s.values[i];
        if (!uses[i] || skip[i] || (v.op != ADD && v.op != SUB)) continue;
        bool first = joins(v.a), second = joins(v.b);
        if (!first && !second) continue;
        const Straight::Value product = s.values[second ? v.b : v.a];
        int32_t rest = second ? v.a : v.b;
        v = {v.op == ADD ? int32_t(FMA) : second ? int32_t(FNMA) : int32_t(FMS), product.a, product.b, rest};
    }
}

// Gives values rows: a list of lines that computes some of them.
class Lister {
  public:
    explicit Lister(Straight& s) : s_(s), rows_(s.values.size()) {
        for (size_t v = 0; v < rows_.size(); v++)
            if (s.values[v].op == Straight::LEAF) rows_[v] = leaf(s.values[v]);
    }
    void place(int32_t v, LineRow row) { rows_[v] = row; }
    const LineRow& row(int32_t v) const { return rows_[v]; }

    // Lines for the values that `uses` counts and that have no row yet, then copies to where values are wanted a second time.
    std::vector<Line> list(const std::vector<int>& uses, const std::vector<std::pair<int32_t, LineRow>>& wanted,
                           const std::vector<Straight::Sum>& sums) {
        std::vector<Line> made;
        std::vector<bool> todo(rows_.size()), first(wanted.size());
        for (size_t v = 0; v < rows_.size(); v++) todo[v] = uses[v] && rows_[v].kind == LineRow::NONE;
        for (size_t i = 0; i < wanted.size(); i++) {
            int32_t v = wanted[i].first;
            first[i] = rows_[v].kind == LineRow::NONE;
            if (first[i]) rows_[v] = wanted[i].second;
        }
        std::vector<int> left = readers(todo, wanted, sums);
        for (size_t v = 0; v < rows_.size(); v++)
            if (todo[v]) made.push_back(line(int32_t(v), left));
        for (size_t i = 0; i < wanted.size(); i++)
            if (!first[i]) made.push_back({COPY, wanted[i].second, {rows_[wanted[i].first]}});
        for (const Straight::Sum& sum : sums) made.push_back(addition(sum));
        return made;
    }

  private:
    static LineRow leaf(const Straight::Value& v) {
        if (v.a == UNIFORM) return {LineRow::NUMBER, v.b};
        if (v.a == ROWDATA) return {LineRow::DATA, v.b};
        if (v.a == COTANGENT) return {LineRow::INCOMING, v.b};
        return v.b == 0 ? LineRow{LineRow::TIME, 0} : LineRow{LineRow::STATE, v.b - 1};
    }

    // How many lines will still read each value; what is copied or summed at the end is read for ever.
    std::vector<int> readers(const std::vector<bool>& todo, const std::vector<std::pair<int32_t, LineRow>>& wanted,
                             const std::vector<Straight::Sum>& sums) const {
        constexpr int FOR_EVER = 1 << 20;
        std::vector<int> left(rows_.size());
        for (size_t v = 0; v < rows_.size(); v++) {
            if (!todo[v]) continue;
            const int32_t operands[3] = {s_.values[v].a, s_.values[v].b, s_.values[v].c};
            for (int k = 0; k < Straight::arity(s_.values[v].op); k++) left[operands[k]]++;
        }
        for (auto& want : wanted) left[want.first] += FOR_EVER;
        for (const Straight::Sum& sum : sums) {
            left[sum.g] += FOR_EVER;
            if (sum.x >= 0) left[sum.x] += FOR_EVER;
        }
        return left;
    }
    Line line(int32_t v, std::vector<int>& left) {
        const Straight::Value& value = s_.values[v];
        const int32_t operands[3] = {value.a, value.b, value.c};
        Line made = {value.op, {}, {}};
        for (int k = 0; k < Straight::arity(value.op); k++) {
            int32_t x = operands[k];
            made.operands[k] = rows_[x];
            if (--left[x] == 0 && rows_[x].kind == LineRow::SPARE) free_.push_back(rows_[x].index);
        }
        if (rows_[v].kind == LineRow::NONE) rows_[v] = {LineRow::SPARE, spare()};
        made.out = rows_[v];
        return made;
    }
    int32_t spare() {
        if (free_.empty()) return most_++, s_.num_spare = s_.num_spare > most_ ? s_.num_spare : most_, most_ - 1;
        int32_t row = free_.back();
        free_.pop_back();
        return row;
    }
    Line addition(const Straight::Sum& sum) {
        size_t j = 0;
        while (j < s_.totals.size() && s_.totals[j] != sum.acc) j++;
        if (j == s_.totals.size()) s_.totals.push_back(sum.acc);
        LineRow total = {LineRow::TOTAL, int32_t(j)};
        if (sum.x < 0) return {ADD, total, {total, rows_[sum.g]}};
        return {FMA, total, {rows_[sum.g], rows_[sum.x], total}};
    }

    Straight& s_;
    std::vector<LineRow> rows_;
    std::vector<int32_t> free_;
    int32_t most_ = 0;
};

void make_lists(Straight& s) {
    std::vector<int> forward = count_uses(s, false), all = count_uses(s, true);
    std::vector<std::pair<int32_t, LineRow>> out;
    for (size_t d = 0; d < s.out.size(); d++) out.push_back({s.out[d], {LineRow::OUT, int32_t(d)}});
    s.forward = Lister(s).list(forward, out, {});

    // The same, and what the way back reads again in rows of its own, where it is not dy/dt itself.
    Lister back(s);
    std::vector<bool> again(s.values.size());
    auto read = [&](int32_t v) { v >= 0 ? void(again[v] = true) : void(); };
    for (size_t v = 0; v < s.values.size(); v++) {
        const Straight::Value& value = s.values[v];
        if (!all[v] || forward[v] || value.op == Straight::LEAF) continue;
        const int32_t operands[3] = {value.a, value.b, value.c};
        for (int k = 0; k < Straight::arity(value.op); k++) read(operands[k]);
    }
    for (const Straight::Sum& sum : s.sums) read(sum.g), read(sum.x);
    std::vector<std::pair<int32_t, LineRow>> wanted;
    for (size_t d = 0; d < s.grad_y.size(); d++) wanted.push_back({s.grad_y[d], {LineRow::GRAD_STATE, int32_t(d)}});
    for (size_t i = 0; i < s.grad_rowdata.size(); i++) wanted.push_back({s.grad_rowdata[i], {LineRow::GRAD_DATA, int32_t(i)}});
    if (s.grad_t >= 0) wanted.push_back({s.grad_t, {LineRow::GRAD_TIME, 0}});
    for (auto& want : wanted) read(want.first);
    std::vector<std::pair<int32_t, LineRow>> kept = out;
    for (size_t v = 0; v < s.values.size(); v++)
        if (again[v] && forward[v] && s.values[v].op != Straight::LEAF && back.row(int32_t(v)).kind == LineRow::NONE) {
            bool is_out = false;
            for (int32_t o : s.out) is_out = is_out || o == int32_t(v);
            if (!is_out) kept.push_back({int32_t(v), {LineRow::KEPT, s.num_kept++}});
        }
    s.replay = back.list(forward, kept, {});
    s.backward = back.list(all, wanted, s.sums);
    for (const Straight::Value& v : s.values) s.num_uniform += v.op == Straight::LEAF && v.a == UNIFORM;
    for (size_t v = 0; v < s.values.size(); v++)
        s.reads_time = s.reads_time || (all[v] && s.values[v].op == Straight::LEAF && s.values[v].a == SAVED && s.values[v].b == 0);
}

} // namespace

bool straighten(const Program& program, Straight& to) {
    if (!Flattener(program, to).run()) return false;
    // First by what dy/dt alone reads: its numbers must not depend on whether there are gradients.
    join_products(to, count_uses(to, false), std::vector<int>(to.values.size()));
    join_products(to, count_uses(to, true), count_uses(to, false));
    std::vector<int> uses = count_uses(to, true);
    size_t lines = 0;
    for (size_t i = 0; i < uses.size(); i++) lines += uses[i] && to.values[i].op != Straight::LEAF;
    if (lines > MOST_LINES) return false;
    make_lists(to);
    return true;
}

} // namespace neurode
