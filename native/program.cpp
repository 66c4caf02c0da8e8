// Reads the flat form of a tile program. Compiled once, for every processor.
#include "check.h"

#include <cstring>
#include <memory>
#include <vector>

#include "straight.h"

namespace neurode {
namespace {

struct Storage : Program { // a program and the arrays that its instructions point into
    Straight list, list_back;
    std::vector<int32_t> maps;
    std::vector<Instruction> code[3];
    std::vector<std::unique_ptr<Operand[]>> operands;
    std::vector<std::unique_ptr<Output[]>> outputs;
    std::vector<std::unique_ptr<Chain[]>> chains;
};

class Reader {
  public:
    Reader(const int32_t* words, int64_t n, Storage& to) : at_(words), end_(words + n), to_(to) {}

    int32_t next() {
        if (at_ >= end_) return ok_ = false, 0;
        return *at_++;
    }
    Place place() {
        Place p;
        p.space = next(), p.row = next();
        ok_ = ok_ && p.space < NUM_SPACES;
        return p;
    }
    Operand operand() {
        Operand x;
        x.space = next(), x.row = next(), x.stride = next();
        ok_ = ok_ && x.space >= Operand::ABSENT && x.space < NUM_SPACES;
        if (x.mapped()) {
            ok_ = ok_ && x.row >= 0 && size_t(x.row) < to_.maps.size();
            x.map = to_.maps.data() + (ok_ ? x.row : 0);
        }
        return x;
    }
    bool ok() const { return ok_; }
    bool done() const { return at_ >= end_; }

    Instruction instruction() {
        const int32_t* start = at_;
        Instruction i;
        i.opcode = next();
        int32_t length = next();
        switch (i.opcode) {
        case POINTWISE: pointwise(i); break;
        case GEMM: gemm(i); break;
        case WGRAD:
            i.count = next(), i.O = next(), i.K = next(), i.acc = next(), i.acc_o = next(), i.acc_k = next();
            i.x = operand(), i.z = operand();
            break;
        case RGRAD:
            i.n = next(), i.m = next(), i.acc = next();
            i.x = operand();
            break;
        case REDUCE:
            i.kind = next(), i.n = next(), i.m = next();
            i.x = operand(), i.out = place();
            break;
        case SAMPLE_PRODUCT:
            i.count = next(), i.O = next(), i.K = next(), i.J = next();
            i.x = operand(), i.z = operand(), i.out = place();
            break;
        default: ok_ = false;
        }
        ok_ = ok_ && at_ == start + length;
        return i;
    }

  private:
    void pointwise(Instruction& i) {
        i.n = next(), i.num_inputs = next(), i.num_outputs = next(), i.num_steps = next();
        int64_t words = 3 * (int64_t(i.num_inputs) + i.num_outputs) + 4 * int64_t(i.num_steps);
        if (i.num_inputs < 0 || i.num_outputs < 0 || i.num_steps < 0 || words > end_ - at_) {
            ok_ = false;
            return;
        }
        auto inputs = std::make_unique<Operand[]>(i.num_inputs);
        auto outputs = std::make_unique<Output[]>(i.num_outputs);
        auto steps = std::make_unique<Chain[]>(i.num_steps);
        int32_t registers = i.num_inputs + i.num_steps;
        for (int k = 0; k < i.num_inputs; k++) inputs[k] = operand();
        for (int k = 0; k < i.num_outputs; k++) {
            outputs[k].reg = next(), outputs[k].at = place();
            ok_ = ok_ && outputs[k].reg >= 0 && outputs[k].reg < registers;
        }
        for (int k = 0; k < i.num_steps; k++) {
            Chain& s = steps[k];
            s = {next(), next(), next(), next()};
            int32_t operands[3] = {s.a, s.b, s.c};
            ok_ = ok_ && s.micro >= 0 && s.micro < NUM_MICROS;
            for (int j = 0; ok_ && j < arity_of(s.micro); j++)
                ok_ = operands[j] >= 0 && operands[j] < i.num_inputs + k;
            if (ok_ && arity_of(s.micro) < 3) s.c = -1; // an operand that is not there is nobody's business
            if (ok_ && arity_of(s.micro) < 2) s.b = -1;
        }
        i.inputs = inputs.get(), i.outputs = outputs.get(), i.steps = steps.get();
        ok_ = ok_ && registers <= MAX_REGISTERS;
        if (registers > to_.max_registers) to_.max_registers = registers;
        to_.operands.push_back(std::move(inputs));
        to_.outputs.push_back(std::move(outputs));
        to_.chains.push_back(std::move(steps));
    }
    void gemm(Instruction& i) {
        i.count = next(), i.O = next(), i.K = next(), i.weight = next(), i.weight_o = next(), i.weight_k = next();
        i.bias = next(), i.bias_o = next(), i.act = next();
        i.x = operand(), i.out = place(), i.add = operand(), i.aux = operand();
        ok_ = ok_ && i.act >= 0 && i.act < NUM_MICROS;
        to_.has_products = true;
    }

    const int32_t *at_, *end_;
    Storage& to_;
    bool ok_ = true;
};

} // namespace

Program* decode(const int32_t* words, int64_t n, const int32_t* maps, int64_t num_maps, int32_t dtype, const char** error) {
    if (n < PROGRAM_HEADER || words[0] != PROGRAM_MAGIC) return *error = "these words are not a tile program", nullptr;
    if (words[1] != PROGRAM_VERSION) return *error = "the program has another version than the library", nullptr;
    auto p = std::make_unique<Storage>();
    p->maps.assign(maps, maps + num_maps);
    Reader header(words + 2, PROGRAM_HEADER - 2, *p);
    p->dtype = dtype;
    p->size = header.next(), p->num_uniforms = header.next(), p->num_accumulators = header.next();
    p->num_rowdata = header.next(), p->rows_saved = header.next(), p->rows_forward = header.next();
    p->rows_backward = header.next(), p->rows_cotangent = header.next();
    p->out = header.place(), p->grad_y = header.place(), p->grad_t = header.place(), p->grad_rowdata = header.place();
    Section* sections[3] = {&p->forward, &p->backward, &p->gradient};
    const int32_t* at = words + PROGRAM_HEADER;
    for (int s = 0; s < 3; s++) {
        int32_t length = header.next();
        if (length < 0 || length > words + n - at) return *error = "a section is longer than the program", nullptr;
        Reader reader(at, length, *p);
        while (reader.ok() && !reader.done()) p->code[s].push_back(reader.instruction());
        if (!reader.ok()) return *error = "an instruction is malformed", nullptr;
        *sections[s] = {p->code[s].data(), int32_t(p->code[s].size())};
        at += length;
    }
    if (!header.ok() || p->size < 1 || !p->out.present()) return *error = "the header is malformed", nullptr;
    if (const char* wrong = check(*p, num_maps)) return *error = wrong, nullptr;
    if (straighten(*p, p->list)) p->straight = &p->list;
    if (p->straight && straighten_back(*p, p->list_back)) p->straight_back = &p->list_back;
    return p.release();
}

void release(Program* program) { delete static_cast<Storage*>(program); }

} // namespace neurode
