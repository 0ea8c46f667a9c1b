// The arithmetic coder of payload/coders/symbols.py (docs/entropy-coder.md) for CUDA: one warp codes one chunk.
//
// Apart from the one or two channels before, the contexts of a bit depend on symbols at other positions. All lanes
// compute them together, for 32 channels at a time. One lane then codes the bits of these channels one after the other.
// Coding takes about as long for one chunk as for hundreds, and leaves most units of the device to other kernels.
// A block has several warps that share nothing: kernels that need most registers of a multiprocessor then find some
// multiprocessors without coders.
//
// launch.py compiles this file at run time, with the format's constants in front. As C++ for one lane it runs on a CPU,
// where tests compare it with the coder of the host.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;

#ifndef LANE
#define LANE (int)(threadIdx.x % LANES)
#define WARP (int)(threadIdx.x / LANES)
#define CHUNK ((int)blockIdx.x * WARPS + WARP)
#define PREFETCH(pointer) asm volatile("prefetch.global.L1 [%0];" ::"l"(pointer))
#define SYNC_WARP() __syncwarp()
#define SHARED __shared__
#define EXTERN_SHARED(type, name) extern __shared__ type name[]
#define NEAR(pointer) (u32)__cvta_generic_to_shared(pointer)
#define READ(pointer) __ldg(pointer)
#endif

// Contexts, weights and tables lie in shared memory, if it has room for all of them. They have 32-bit addresses there:
// with C++ pointers the compiler would compute the start of shared memory again and again.
#if defined(__CUDA_ARCH__) && IN_SHARED
typedef u32 Near;
#define LOADS(name, type, kind, constraint) \
    __device__ __forceinline__ type name(Near at) { \
        type value; \
        asm volatile("ld.shared." kind " %0, [%1];" : constraint(value) : "r"(at)); \
        return value; \
    }
LOADS(load_u32, u32, "u32", "=r")
LOADS(load_i32, int, "s32", "=r")
LOADS(load_u16, u32, "u16", "=r")
LOADS(load_i16, int, "s16", "=r")
__device__ __forceinline__ void load_pair(Near at, i64 &a, i64 &b) {
    asm volatile("ld.shared.v2.s64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "r"(at));
}
__device__ __forceinline__ int4 load_four(Near at) {
    int4 v;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
__device__ __forceinline__ void store(Near at, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value));
}
__device__ __forceinline__ void store_pair(Near at, i64 a, i64 b) {
    asm volatile("st.shared.v2.s64 [%0], {%1, %2};" ::"r"(at), "l"(a), "l"(b));
}
#else
typedef u8 *Near;
__device__ __forceinline__ u32 load_u32(Near at) { return *(u32 *)at; }
__device__ __forceinline__ int load_i32(Near at) { return *(int *)at; }
__device__ __forceinline__ u32 load_u16(Near at) { return *(u16 *)at; }
__device__ __forceinline__ int load_i16(Near at) { return *(short *)at; }
__device__ __forceinline__ void load_pair(Near at, i64 &a, i64 &b) {
    a = ((i64 *)at)[0];
    b = ((i64 *)at)[1];
}
__device__ __forceinline__ int4 load_four(Near at) { return *(int4 *)at; }
__device__ __forceinline__ void store(Near at, u32 value) { *(u32 *)at = value; }
__device__ __forceinline__ void store_pair(Near at, i64 a, i64 b) {
    ((i64 *)at)[0] = a;
    ((i64 *)at)[1] = b;
}
#endif

// A pass: its channels and positions, and the prior's predictions.
struct Step {
    i64 start, count, second, first_position, positions;
    const short *means;  // in eighths, int16 (chunks slices positions, count)
    const u8 *indices;   // of scales, in quarters
    short *out;          // decoded symbols
};

// Arguments of a launch, 64 bits each, so that Python can write them as an array.
struct Job {
    const u32 *tables;  // stretch, squash and reciprocal, in 16 bits each
    const u8 *neighbour, *levels, *low_bits;
    i64 limit, rate, single, latents, chunks;
    const int2 *locations;      // rows and columns of the positions of all passes, int32 (positions, 2)
    i64 passes;              // number of steps
    i64 slices, height, width;
    // chunks
    const short *source;     // symbols to encode, int16 (chunks, slices, height, width, latents)
    short *symbols;          // with a border of zeros, int16 (chunks, slices, height + 2, width + 2, latents)
    u32 *contexts;
    i64 *weights;            // uint32 (chunks, CONTEXTS), int64 (chunks, MIXERS INPUTS)
    i64 *state;              // int64 (chunks, STATE): low, high, value, position, error
    u8 *data;                // the streams
    const i64 *bounds;       // int64 (chunks + 1): start of each stream
    Step steps[PASSES];
};

// The interval of the arithmetic coder is low to low + range; offset is the decoder's value minus low.
struct Interval {
    u64 low, range, offset;
    int position, size;
    u8 *data;
};

struct Learning {
    Near contexts, weights, stretch, squash, reciprocal;
    int limit, rate;
};

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int absolute(int a) { return a < 0 ? -a : a; }

template <bool DECODING> __device__ __forceinline__ int code(int bit, u32 p, Interval &i) {
    const u64 part = (u64)(u32)(i.range >> 16) * p;  // share of the interval for a one, minus 1
    if (DECODING) bit = i.offset <= part;
    if (bit) {
        i.range = part;
    } else {
        i.low += part + 1;
        i.range -= part + 1;
        if (DECODING) i.offset -= part + 1;
    }
    while (((u32)((i.low ^ (i.low + i.range)) >> 32) >> (CODE_BITS - 40)) == 0) {
        if (DECODING) {
            i.offset = i.offset << 8 | (i.position < i.size ? i.data[i.position] : 0);
        } else if (i.position < i.size) {
            i.data[i.position] = (u8)(i.low >> (CODE_BITS - 8));
        }
        i.position++;
        i.low = (i.low << 8) & CODE_MAX;
        i.range = i.range << 8 | 255;
    }
    return bit;
}

// Share by which an observation moves a context, in 1/65536.
__device__ __forceinline__ int step_of(u32 state, const Learning &l) {
    return (int)load_u16(l.reciprocal + 2 * (state & 1023));
}

__device__ __forceinline__ u32 adapted(u32 state, int bit, int step, const Learning &l) {
    const int count = state & 1023, p = (int)(state >> 10);
    const int moved = p + (int)(((i64)((bit ? 4194303 : 0) - p) * step) >> 16);
    return (u32)moved << 10 | (u32)(count < l.limit ? count + 1 : count);
}

template <bool DECODING>
__device__ __forceinline__ int single(int bit, int a, Interval &i, const Learning &l) {
    const Near at = l.contexts + 4 * a;
    const u32 state = load_u32(at);
    const int step = step_of(state, l);
    bit = code<DECODING>(bit, (u32)min_of(max_of((int)(state >> 16), 16), 65520), i);
    store(at, adapted(state, bit, step, l));
    return bit;
}

template <bool DECODING>
__device__ __forceinline__ int mixed(int bit, int a, int b, int c, int mixer, Interval &i, const Learning &l) {
    const Near at_a = l.contexts + 4 * a, at_b = l.contexts + 4 * b, at_c = l.contexts + 4 * c;
    const Near w = l.weights + 8 * INPUTS * mixer;
    const u32 state_a = load_u32(at_a), state_b = load_u32(at_b), state_c = load_u32(at_c);
    i64 w0, w1, w2, w3;
    load_pair(w, w0, w1);
    load_pair(w + 16, w2, w3);
    const int sa = load_i16(l.stretch + 2 * (state_a >> 18)), sb = load_i16(l.stretch + 2 * (state_b >> 18));
    const int sc = load_i16(l.stretch + 2 * (state_c >> 18));
    const int step_a = step_of(state_a, l), step_b = step_of(state_b, l), step_c = step_of(state_c, l);
    const i64 dot = (w0 * sa + w1 * sb + w2 * sc + w3 * STRETCH_ONE) >> 16;
    const int x = dot < -STRETCH_MAX ? -STRETCH_MAX : dot > STRETCH_MAX ? STRETCH_MAX : (int)dot;
    const int p = (int)load_u16(l.squash + 2 * (x + STRETCH_MAX));
    bit = code<DECODING>(bit, (u32)p, i);
    const int error = ((bit ? 65535 : 0) - p) * l.rate;
    store_pair(w, w0 + (((i64)sa * error + 131072) >> 18), w1 + (((i64)sb * error + 131072) >> 18));
    store_pair(w + 16, w2 + (((i64)sc * error + 131072) >> 18), w3 + (((i64)STRETCH_ONE * error + 131072) >> 18));
    // the three contexts are distinct
    store(at_a, adapted(state_a, bit, step_a, l));
    store(at_b, adapted(state_b, bit, step_b, l));
    store(at_c, adapted(state_c, bit, step_c, l));
    return bit;
}

// Codes sign and magnitude of a difference that is not zero; its zero flag has been coded. `set` is where its set of
// contexts begins.
template <bool DECODING>
__device__ __forceinline__ int difference_of(
    int difference, int channel, int scale, int level, int fraction, int before, int plain, int set, Interval &i,
    const Learning &l, int &error
) {
    int negative = single<DECODING>(difference < 0, SIGN + scale * FRACTIONS + fraction, i, l);
    int magnitude = absolute(difference) - 1, coarse = magnitude >> plain, v = 0;
    int by_scale = set + UNARY_SCALE + scale * UNARY;
    int by_level = set + UNARY_NEIGHBOURS + ((scale >> 3) * NEIGHBOURS + level) * UNARY;
    int by_channel = set + UNARY_CHANNEL + (channel * 3 + min_of((before + 1) >> 1, 2)) * 4;
    while (v < UNARY) {
        int small = min_of(v, 3);
        if (!mixed<DECODING>(
                coarse > v, by_scale + v, by_level + v, by_channel + small, SCALES + small * 16 + (scale >> 3), i, l
            ))
            break;
        v++;
    }
    if (v == UNARY) {
        int rest = coarse - UNARY + 1, length = 0, bits = 0;
        if (!DECODING)
            while (rest >> (length + 1)) length++;
        while (single<DECODING>(bits < length, ESCAPE + bits, i, l))
            if (++bits == ESCAPE_BITS) {
                error = 1;
                return 0;
            }
        int tail = 1;
        for (int n = bits - 1; n >= 0; n--) tail = (tail << 1) | code<DECODING>((rest >> n) & 1, 32768, i);
        v = UNARY + tail - 1;
    }
    for (int n = plain - 1; n >= 0; n--) {
        int bit = (magnitude >> n) & 1;
        bit = n == plain - 1 ? single<DECODING>(bit, LOW_BIT + scale, i, l) : code<DECODING>(bit, 32768, i);
        v = (v << 1) | bit;
    }
    return DECODING ? (negative ? -(v + 1) : v + 1) : difference;
}

#if IN_SHARED
// Copy words into shared memory, or out of it.
__device__ __forceinline__ void load_shared(Near to, const u32 *from, int words) {
    for (int n = LANE; n < words; n += LANES) store(to + 4 * n, from[n]);
}
__device__ __forceinline__ void store_shared(u32 *to, Near from, int words) {
    for (int n = LANE; n < words; n += LANES) to[n] = load_u32(from + 4 * n);
}
#endif

// What is known of a symbol before the channels in front of it: three contexts of its zero flag, and other values.
__device__ __forceinline__ void store_hints(
    Near to, const Job &job, int set, int mean, int scale, int level, int channel, int second
) {
    const int centre = (mean + 4) >> 3, off_zero = centre != 0;
    int fraction = mean - 8 * centre;
    const int flip = fraction < 0;
    if (flip) fraction = -fraction;
    const int by_channel = ZERO_CHANNEL + ((second * (int)job.latents + channel) * NEIGHBOURS + level) * 2 + off_zero;
    store(to, set + ZERO_SCALE + (scale * FRACTIONS + fraction) * 2 + off_zero);
    store(to + 4, by_channel);
    store(to + 8, set + ZERO_PREVIOUS + scale * PREVIOUS * 5 + min_of(level >> 1, 4));
    store(to + 12, scale | level << 7 | fraction << 11 | flip << 14 | (u32)(centre + 8192) << 15);
}

// With a trellis, which only decoders have here, symbols are in halves of a step; a second hint is for its odd states.
template <bool DECODING, bool TRELLIS> __device__ __forceinline__ void code_chunk(const Job &job) {
    const int lane = LANE, chunk = CHUNK, latents = (int)job.latents, width = (int)job.width, height = (int)job.height;
    const int slices = (int)job.slices, single_below = (int)job.single;
    if (chunk >= job.chunks) return;
    const i64 plane = (i64)(height + 2) * (width + 2) * latents, pitch = (i64)(width + 2) * latents;
    short *symbols = job.symbols + chunk * slices * plane;
    const short *source = job.source + (DECODING ? 0 : chunk * slices * (i64)height * width * latents);
    u32 *chunk_contexts = job.contexts + (i64)chunk * CONTEXTS;
    i64 *chunk_weights = job.weights + (i64)chunk * (MIXERS * INPUTS);
    // By lane: hints for even and odd states, the difference, and the decoded symbol.
#if IN_SHARED
    EXTERN_SHARED(int4, memory);
    const Near hints = NEAR(memory), differences = hints + 32 * LANES, decoded = differences + 4 * LANES, failed = decoded + 4 * LANES;
    const Near weights = failed + 16, contexts = weights + 8 * MIXERS * INPUTS, tables = contexts + 4 * CONTEXTS;
    load_shared(weights, (const u32 *)chunk_weights, 2 * MIXERS * INPUTS);
    load_shared(contexts, chunk_contexts, CONTEXTS);
    load_shared(tables, job.tables, TABLE_WORDS);
#else
    SHARED int4 memory[WARPS][3 * LANES];
    const Near hints = (Near)memory[WARP];
    const Near differences = hints + 32 * LANES, decoded = differences + 4 * LANES, failed = decoded + 4 * LANES;
    const Near weights = (Near)chunk_weights, contexts = (Near)chunk_contexts, tables = (Near)job.tables;
#endif
    const Learning l = {
        contexts, weights, tables, tables + 2 * SQUASH_AT, tables + 2 * RECIPROCAL_AT, (int)job.limit, (int)job.rate
    };
    i64 *state = job.state + chunk * STATE;
    Interval i = {(u64)state[0], (u64)(state[1] - state[0]), (u64)(state[2] - state[0]), (int)state[3],
                  (int)(job.bounds[chunk + 1] - job.bounds[chunk]), job.data + job.bounds[chunk]};
    int error = (int)state[4];
    if (lane == 0) store(failed, (u32)error);
    SYNC_WARP();
    for (int pass = 0; pass < job.passes && !load_i32(failed); pass++) {
        const Step &step = job.steps[pass];
        const int start = (int)step.start, count = (int)step.count, second = (int)step.second;
        const int positions = (int)step.positions, rows = slices * positions;
        const int2 *locations = job.locations + step.first_position;
        const i64 first = (i64)chunk * rows * count;
        const short *means = step.means + first;
        const u8 *indices = step.indices + first;
        short *out = step.out + (DECODING ? first : 0);
        int last = 0, last_but_one = 0, node = 0;
        // Values of the next channels, loaded while one lane codes the channels before.
        int row = 0, from = 0, s = 0, n = 0;
        int2 location = {0, 0};
        int mean = 0, index = 0, symbol = 0;
        bool active = lane < count && rows > 0;
        i64 at = lane;
        if (rows) location = locations[0];
        if (active) {
            mean = means[at];
            index = indices[at];
            if (!DECODING) symbol = source[((i64)location.x * width + location.y) * latents + start + lane];
        }
        while (row < rows) {
            const int channels = min_of(LANES, count - from), k = start + from + lane;
            short *current = symbols + s * plane + (i64)(location.x + 1) * pitch + (i64)(location.y + 1) * latents + k;
            if (active) {
                const short *up = current - pitch, *down = current + pitch;
                const int magnitudes = 2 * (absolute(current[-latents]) + absolute(current[latents]) + absolute(up[0])
                                      + absolute(down[0]))
                                 + absolute(up[-latents]) + absolute(up[latents]) + absolute(down[-latents])
                                 + absolute(down[latents]);
                const int level = READ(job.neighbour + min_of(magnitudes >> TRELLIS, 63)), scale = READ(job.levels + index);
                const Near lane_hints = hints + 32 * lane;
                store_hints(lane_hints, job, 0, mean, scale, level, k, second);
                if (TRELLIS) {
                    const int odd_mean = mean + min_of(max_of(mean, -4), 4);
                    store_hints(lane_hints + 16, job, ODD, odd_mean, scale, level, k, second);
                }
                const int centre = (mean + 4) >> 3;
#if !IN_SHARED
                PREFETCH(chunk_contexts + ZERO_CHANNEL + ((second * latents + k) * NEIGHBOURS + level) * 2 + (centre != 0));
#endif
                if (!DECODING) store(differences + 4 * lane, (u32)(mean < 8 * centre ? centre - symbol : symbol - centre));
            }
            const int coded = symbol;
            const i64 coded_at = at;
            const bool was_active = active;
            if (from == 0) last = last_but_one = 0;
            if ((from += LANES) >= count) {
                from = 0;
                if (++n == positions) {
                    n = 0;
                    s++;
                }
                if (++row < rows) location = locations[n];
            }
            active = row < rows && from + lane < count;
            at = (i64)row * count + from + lane;
            if (active) {
                mean = means[at];
                index = indices[at];
                const i64 pixel = (s * (i64)height + location.x) * width + location.y;
                if (!DECODING) symbol = source[pixel * latents + start + from + lane];
            }
            SYNC_WARP();
            if (lane == 0) {
                int4 next = load_four(hints);
                int next_difference = DECODING ? 0 : load_i32(differences);
                for (int c = 0; c < channels; c++) {
                    const int odd = TRELLIS ? node & 1 : 0, set = odd ? ODD : 0;
                    const int4 now = odd ? load_four(hints + 32 * c + 16) : next;
                    const int scale = now.w & 127;
                    int difference = next_difference;
                    const int ahead = min_of(c + 1, LANES - 1);
                    next = load_four(hints + 32 * ahead);
                    if (!DECODING) next_difference = load_i32(differences + 4 * ahead);
                    const int before = 2 * min_of(absolute(last), 2) + min_of(absolute(last_but_one), 1);
                    const int previous = now.z + before * 5;
                    int bit = difference != 0;
                    if (scale < single_below) bit = single<DECODING>(bit, previous, i, l);
                    else bit = mixed<DECODING>(bit, now.x, now.y, previous, scale, i, l);
                    if (DECODING) difference = 0;
                    if (bit) {
                        difference = difference_of<DECODING>(
                            difference, k + c, scale, now.w >> 7 & 15, now.w >> 11 & 7, before,
                            READ(job.low_bits + scale), set, i, l, error
                        );
                        if (error) break;
                    }
                    const int centre = (int)((u32)now.w >> 15) - 8192;
                    const int value = now.w >> 14 & 1 ? centre - difference : centre + difference;
                    if (DECODING) {
                        int decoded_symbol = value;
                        if (TRELLIS) {
                            decoded_symbol = 2 * value - (value > 0 ? odd : value < 0 ? -odd : 0);
                            node = (int)(((value & 1 ? NEXT_ODD : NEXT_EVEN) >> 4 * node) & 15);
                        }
                        if (absolute(decoded_symbol) > SYMBOL_MAX) {
                            error = 1;
                            break;
                        }
                        store(decoded + 4 * c, (u32)decoded_symbol);
                    }
                    last_but_one = last;
                    last = value;
                }
                if (error) store(failed, 1);
            }
            SYNC_WARP();
            if (load_i32(failed)) break;
            if (was_active) {
                const int value = DECODING ? load_i32(decoded + 4 * lane) : coded;
                if (DECODING) out[coded_at] = (short)value;
                *current = (short)value;
            }
            SYNC_WARP();
        }
    }
    SYNC_WARP();
#if IN_SHARED
    if (DECODING) {  // other passes follow
        store_shared((u32 *)chunk_weights, weights, 2 * MIXERS * INPUTS);
        store_shared(chunk_contexts, contexts, CONTEXTS);
    }
#endif
    if (lane == 0) {
        state[0] = (i64)i.low;
        state[1] = (i64)(i.low + i.range);
        state[2] = (i64)(i.low + i.offset);
        state[3] = i.position;
        state[4] = error;
    }
}

extern "C" __global__ void encode(const Job job) { code_chunk<false, false>(job); }

extern "C" __global__ void decode(const Job job) { code_chunk<true, false>(job); }

extern "C" __global__ void decode_trellis(const Job job) { code_chunk<true, true>(job); }
