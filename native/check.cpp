// Whether a decoded program stays within what its header declares: a program that does can run without reading or writing
// anything else, whatever its numbers are.
#include "check.h"

#include <algorithm>

namespace neurode {
namespace {

constexpr int64_t MOST = ROW_MASK; // rows of an operand, and of a space

class Checker {
  public:
    Checker(const Program& program, int64_t num_maps) : p_(program), num_maps_(num_maps) {}

    const char* header() const {
        const int64_t numbers[] = {p_.num_uniforms, p_.num_accumulators, p_.num_rowdata, p_.rows_saved,
                                   p_.rows_forward, p_.rows_backward, p_.rows_cotangent};
        for (int64_t n : numbers)
            if (n < 0 || n > MOST) return "the header has a number of rows that cannot be";
        if (p_.size < 1 || p_.size >= p_.rows_saved) return "the header has no rows for t and y";
        bool back = p_.backward.size || p_.gradient.size;
        if (back && p_.rows_cotangent < p_.size) return "the header has no rows for the cotangent";
        if (!holds(p_.out, p_.size, FORWARD)) return "the result lies outside its space";
        if (p_.grad_y.present() && !holds(p_.grad_y, p_.size, BACKWARD)) return "the cotangent of y lies outside its space";
        if (p_.grad_t.present() && !holds(p_.grad_t, 1, BACKWARD)) return "the cotangent of t lies outside its space";
        if (p_.grad_rowdata.present() && !holds(p_.grad_rowdata, p_.num_rowdata, BACKWARD))
            return "the cotangent of the sample's data lies outside its space";
        return nullptr;
    }

    const char* instruction(const Instruction& i, int section) {
        section_ = section;
        reads_.clear();
        bool gradient = i.opcode == WGRAD || i.opcode == RGRAD;
        if (gradient != (section == GRADIENT)) return "an instruction stands in a section that has no place for it";
        bool fine = true;
        switch (i.opcode) {
        case POINTWISE:
            fine = positive({i.n}) && i.num_inputs + i.num_steps > 0;
            for (int k = 0; fine && k < i.num_inputs; k++) fine = operand(i.inputs[k], i.n, true);
            for (int k = 0; fine && k < i.num_outputs; k++) fine = output(i.outputs[k].at, i.n);
            break;
        case GEMM: {
            fine = positive({i.count, i.O, i.K}) && few({i.count, i.K}) && few({i.count, i.O}) &&
                   within(i.weight, {{i.O, i.weight_o}, {i.K, i.weight_k}}, p_.num_uniforms) &&
                   (i.bias < 0 || within(i.bias, {{i.O, i.bias_o}}, p_.num_uniforms)) && arity_of(i.act) < 3 &&
                   (arity_of(i.act) == 1 || !i.aux.absent());
            int64_t rows = int64_t(i.count) * i.O;
            fine = fine && operand(i.x, int64_t(i.count) * i.K) && (i.add.absent() || operand(i.add, rows)) &&
                   (i.aux.absent() || operand(i.aux, rows)) && output(i.out, rows);
            break;
        }
        case WGRAD:
            fine = positive({i.count, i.O, i.K}) && few({i.count, i.K}) && few({i.count, i.O}) &&
                   within(i.acc, {{i.O, i.acc_o}, {i.K, i.acc_k}}, p_.num_accumulators) &&
                   operand(i.x, int64_t(i.count) * i.O) && operand(i.z, int64_t(i.count) * i.K);
            break;
        case RGRAD:
            fine = positive({i.n, i.m}) && few({i.n, i.m}) && within(i.acc, {{i.n, 1}}, p_.num_accumulators) &&
                   operand(i.x, int64_t(i.n) * i.m);
            break;
        case REDUCE:
            fine = positive({i.n, i.m}) && few({i.n, i.m}) && i.kind >= FOLD_SUM && i.kind <= FOLD_PRODUCT &&
                   operand(i.x, int64_t(i.n) * i.m) && output(i.out, i.n);
            break;
        case SAMPLE_PRODUCT:
            fine = positive({i.count, i.O, i.K, i.J}) && few({i.count, i.O, i.K}) && few({i.count, i.K, i.J}) &&
                   few({i.count, i.O, i.J}) && operand(i.x, int64_t(i.count) * i.O * i.K) &&
                   operand(i.z, int64_t(i.count) * i.K * i.J) && output(i.out, int64_t(i.count) * i.O * i.J);
            break;
        }
        return fine ? nullptr : "an instruction reaches outside its spaces, or writes what it reads";
    }

  private:
    enum { FORWARD, BACKWARD, GRADIENT };
    struct Axis {
        int64_t n, step;
    };

    int64_t rows_of(int space, int section) const {
        switch (space) {
        case UNIFORM: return p_.num_uniforms;
        case SAVED: return p_.rows_saved;
        case SCRATCH: return section == FORWARD ? p_.rows_forward : section == BACKWARD ? p_.rows_backward : 0;
        case COTANGENT: return section == FORWARD ? 0 : p_.rows_cotangent;
        case ROWDATA: return p_.num_rowdata;
        default: return 0;
        }
    }
    bool holds(Place at, int64_t n, int section) const {
        return at.space > UNIFORM && at.row >= 0 && at.row + n <= rows_of(at.space, section);
    }
    static bool positive(std::initializer_list<int64_t> sizes) {
        return std::all_of(sizes.begin(), sizes.end(), [](int64_t n) { return n > 0 && n <= MOST; });
    }
    static bool few(std::initializer_list<int64_t> sizes) {
        int64_t product = 1;
        for (int64_t n : sizes)
            if ((product *= n) > MOST) return false;
        return true;
    }
    static bool within(int64_t start, std::initializer_list<Axis> axes, int64_t size) {
        int64_t low = start, high = start;
        for (const Axis& axis : axes) (axis.step < 0 ? low : high) += (axis.n - 1) * axis.step;
        return low >= 0 && high < size;
    }

    bool operand(const Operand& x, int64_t n, bool uniforms = false) {
        if (!x.mapped()) {
            if (x.absent() || (x.space == UNIFORM && !uniforms)) return false;
            if (x.space != UNIFORM) reads_.push_back({x.space, x.row, x.stride, n, nullptr});
            return within(x.row, {{n, x.stride}}, rows_of(x.space, section_));
        }
        if (x.row + n > num_maps_) return false;
        bool uniform = x.uniform();
        for (int64_t i = 0; i < n; i++) {
            int space = x.map[i] >> SPACE_SHIFT;
            if (space < 0 || (space == UNIFORM) != uniform || (x.map[i] & ROW_MASK) >= rows_of(space, section_)) return false;
        }
        if (!uniform) reads_.push_back({-1, 0, 0, n, x.map});
        return uniforms || !uniform;
    }
    bool output(Place at, int64_t n) {
        if (!holds(at, n, section_) || at.space == ROWDATA) return false;
        if (at.space == SAVED && at.row <= p_.size) return false; // t and y belong to the solver
        for (const Read& read : reads_)
            if (meets(read, at, n)) return false;
        reads_.push_back({at.space, at.row, 1, n, nullptr}); // a second output lies elsewhere
        return true;
    }
    struct Read {
        int32_t space, row, stride;
        int64_t n;
        const int32_t* map;
    };
    static bool meets(const Read& read, Place at, int64_t n) {
        if (!read.map && read.space != at.space) return false;
        for (int64_t i = 0; i < read.n; i++) {
            int64_t space = read.map ? read.map[i] >> SPACE_SHIFT : read.space;
            int64_t row = read.map ? read.map[i] & ROW_MASK : read.row + i * read.stride;
            if (space == at.space && row >= at.row && row < at.row + n) return true;
            if (!read.map && !read.stride) break;
        }
        return false;
    }

    const Program& p_;
    int64_t num_maps_;
    int section_ = FORWARD;
    std::vector<Read> reads_;
};

} // namespace

const char* check(const Program& program, int64_t num_maps) {
    Checker checker(program, num_maps);
    if (const char* error = checker.header()) return error;
    const Section* sections[] = {&program.forward, &program.backward, &program.gradient};
    for (int s = 0; s < 3; s++)
        for (const Instruction& i : *sections[s])
            if (const char* error = checker.instruction(i, s)) return error;
    return nullptr;
}

} // namespace neurode
