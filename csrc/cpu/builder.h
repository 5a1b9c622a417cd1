// Makes the operations of a Plan.
#pragma once

#include <map>
#include <set>
#include <tuple>

#include "ops.h"
#include "tiling.h"

namespace dsp {

class Builder {
  public:
    Builder(const Network& network, const PlanKey& key);
    void build(Plan& plan);
    // Without a plan: sizes of the outputs and floats of scratch.
    struct Summary {
        std::vector<std::vector<int>> outputs;
        int64_t arena_floats;
    };
    Summary summary();

  private:
    struct Plane {
        int node, channel;
    };
    // A value of the network, or one sorted by phase. Values of one class have one pitch and one padding, so
    // that a pixel has the same displacement in all of them.
    struct Node {
        int channels, h, w;
        int parent;      // of the class
        int buffer;      // the node whose memory it uses; a view's own has none
        std::vector<Plane> view{}; // of a view: where each channel lies
        int first = -1;  // operation that writes the buffer
        int last = -1;   // operation that reads it last
        int64_t offset = 0;
        Geometry geometry{};
    };
    struct Pads {
        int top = 0, bottom = 0, left = 0, right = 0;
    };
    struct Split {
        int node;
        int source;
        Pair stride;
        const WordKernels* pairs; // what makes planes of words, two channels each, or null
        std::map<std::tuple<int, int, int, int>, int> plane; // (row phase, column phase, channel, other) -> plane
        bool emitted = false;
    };
    struct Tap {
        int row_phase, column_phase, dy, dx;
    };
    struct Draft { // what is known of a step before the geometry is
        int x = -1;
        int split = -1;
        std::vector<Tap> taps;
        bool fast_pool = false;
        int large = 0; // of a product: the input that is no single pixel
    };

    const Network& network_;
    const PlanKey& key_;
    std::vector<Node> nodes_;
    std::vector<Split> splits_;
    std::vector<Draft> drafts_;
    std::vector<Pads> pads_;
    int64_t scratch_begin_ = 0, scratch_floats_ = 0; // behind the values: what one operation needs while it runs

    int root(int node);
    void tie(int a, int b);
    int add_node(int channels, int h, int w);
    void add_view(const Step& step);
    std::set<int> buffers(int node) const;
    void shapes();
    void window(int step, const std::vector<Source>& sources, int h, int w);
    void geometry();
    void lifetimes();
    int64_t memory();
    void emit(Plan& plan);
    Place place(int node) const;
    std::unique_ptr<Op> conv(int step, const Draft& draft);
    std::unique_ptr<Op> pool(int step, const Draft& draft);
    std::unique_ptr<Op> linear(int step);
    std::vector<char> used_channels(int value) const;
    std::vector<int32_t> displacements(const Draft& draft, const std::vector<Source>& sources);
    int vector_pieces(const ConvOp& op) const;
    Extent extent(const ConvOp& op, int64_t count, int pieces) const;
    void place_tiles(ConvOp& op) const;
    void chunk_conv(ConvOp& op, int units, int by_units, const std::vector<double>& costs);
    void block_conv(ConvOp& op, const Draft& draft);
    struct Banding;
    Banding banding(const ConvOp& plain, int used, bool patches) const;
    std::unique_ptr<Op> band_conv(const ConvOp& plain, const Draft& draft, double least);
};

} // namespace dsp
