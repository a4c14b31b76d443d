// Keys that stay when they leave the window. What a slot holds is written as one number: a row of the sequence at work, or
// -2 - row of the cache, or EMPTY. A list of what the slots hold is followed by the positions of those tokens.
//
// DIM is fixed when the kernels are compiled.

#define EMPTY (-1)
#define HALF (DIM / 2)

// Slots that are filled when queries of the stretch of `position` look at them: two stretches are still the window's.
__device__ __forceinline__ int filled_slots(int position, int window, int slots) {
    return min(slots, max(position / window - 1, 0) * window);
}

// Whether the token at `position`, its own key already there, sees a row of the cache: slots, then a ring of two stretches.
__device__ __forceinline__ bool row_in_use(int position, int row, int window, int slots) {
    if (row < slots) return row < filled_slots(position, window, slots);
    int stretch = position / window, half = row - slots >= window;
    return half == stretch % 2 ? row - slots - half * window <= position % window : stretch > 0;
}

// Kept keys before this position are moved on to it, for queries of a stretch; `reach` may be EVERYTHING.
__device__ __forceinline__ int nearest_of(int stretch, int window, int reach) { return max(stretch - 1, 0) * window - reach; }

// Revolutions a token of RoPE's pair `d`, and what float32 misses of them. frequencies [2, HALF].
__device__ __forceinline__ float2 revolutions(const float* frequencies, int d) {
    return make_float2(frequencies[d], frequencies[HALF + d]);
}

// Sine and cosine of a pair after so many tokens.
__device__ __forceinline__ void revolve(int tokens, float2 revolutions, float* sine, float* cosine) {
    float count = static_cast<float>(tokens), whole = count * revolutions.x;
    float missing = fmaf(count, revolutions.x, -whole) + count * revolutions.y, rest = whole - rintf(whole) + missing;
#ifdef ACT_BF16
    // The fast ones are within 1e-6 for at most half a revolution.
    __sincosf(6.283185307f * rest, sine, cosine);
#else
    sincospif(2.0f * rest, sine, cosine);
#endif
}

// The pair (x, y) of a key, moved on.
__device__ __forceinline__ void turn_pair(float& x, float& y, int tokens, float2 revolutions) {
    float sine, cosine, before = x;
    revolve(tokens, revolutions, &sine, &cosine);
    x = before * cosine - y * sine, y = y * cosine + before * sine;
}

// Keys in rows of `ld` elements, by the whole block; `turn_of(j)` is by how many tokens key j is moved on. A thread has one pair
// of every so many keys.
template <class T, class TurnOf>
__device__ __forceinline__ void turn_keys(T* keys, int ld, int count, const float* frequencies, TurnOf turn_of) {
    int at_once = blockDim.x / HALF, d = threadIdx.x % HALF, first = threadIdx.x / HALF;
    if (first == at_once) return;
    float2 own = revolutions(frequencies, d);
#pragma unroll 2
    for (int j = first; j < count; j += at_once) {
        int turn = turn_of(j);
        if (turn <= 0) continue;
        T* key = keys + j * ld + d;
        float x = to_float(key[0]), y = to_float(key[HALF]);
        turn_pair(x, y, turn, own);
        key[0] = from_float<T>(x), key[HALF] = from_float<T>(y);
    }
}

// Threads that share a key, and the pairs of it that each has.
#define KEY_SHARES 8
#define KEY_PAIRS ((HALF + KEY_SHARES - 1) / KEY_SHARES)

__device__ __forceinline__ float sum_of_shares(float x) {
#pragma unroll
    for (int offset = KEY_SHARES / 2; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// liked [count]: log sum over `group` heads of exp(mean query . key * scale), of keys that are moved on; means [group, DIM] in
// shared memory. `key_of(e)` is where key e begins, or null where there is none. By the whole block.
template <class KeyOf, class TurnOf>
__device__ __forceinline__ void likings(float* liked, int count, KeyOf key_of, TurnOf turn_of, const float* means, int group,
                                        float scale, const float* frequencies) {
    int share = threadIdx.x % KEY_SHARES, begin = share * KEY_PAIRS;
    for (int base = 0; base < count; base += blockDim.x / KEY_SHARES) {
        int e = base + threadIdx.x / KEY_SHARES;
        const act* key = e < count ? key_of(e) : nullptr;
        float x[KEY_PAIRS], y[KEY_PAIRS];
        if constexpr (KEY_PAIRS % 4 == 0 && HALF % KEY_SHARES == 0) {
#pragma unroll
            for (int i = 0; i < KEY_PAIRS; i += 4) {
                float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                float4 a = key != nullptr ? load4(key + begin + i) : none, b = key != nullptr ? load4(key + HALF + begin + i) : none;
                x[i] = a.x, x[i + 1] = a.y, x[i + 2] = a.z, x[i + 3] = a.w;
                y[i] = b.x, y[i + 1] = b.y, y[i + 2] = b.z, y[i + 3] = b.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < KEY_PAIRS; i++) {
                bool there = key != nullptr && begin + i < HALF;
                x[i] = there ? to_float(key[begin + i]) : 0.0f, y[i] = there ? to_float(key[HALF + begin + i]) : 0.0f;
            }
        }
        int turn = key != nullptr ? turn_of(e) : 0;
        if (turn > 0) {
#pragma unroll
            for (int i = 0; i < KEY_PAIRS; i++) {
                if (begin + i < HALF) turn_pair(x[i], y[i], turn, revolutions(frequencies, begin + i));
            }
        }
        float best = NEGATIVE_INFINITY, sum = 0.0f;
        for (int g = 0; g < group; g++) {
            const float* mean = means + g * DIM + begin;
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < KEY_PAIRS; i++) {
                if (HALF % KEY_SHARES == 0 || begin + i < HALF) dot += x[i] * mean[i] + y[i] * mean[HALF + i];
            }
            dot = sum_of_shares(dot) * scale;
            float top = fmaxf(best, dot);
            sum = sum * expf(best - top) + expf(dot - top), best = top;
        }
        if (share == 0 && e < count) liked[e] = key != nullptr ? best + logf(sum) : NEGATIVE_INFINITY;
    }
}

// stays [slots + count]: whether a value is among the `most` largest. Of equal ones the held come first, the last slot before
// the first one, then the new in their order. By the whole block.
__device__ __forceinline__ void find_largest(int* stays, const float* values, int slots, int count, int most) {
    auto place = [&](int i) { return i < slots ? slots - 1 - i : i; };
    int share = threadIdx.x % KEY_SHARES, all = slots + count;
    for (int base = 0; base < all; base += blockDim.x / KEY_SHARES) {
        int e = base + threadIdx.x / KEY_SHARES;
        float own = values[min(e, all - 1)], better = 0.0f;
        int own_place = place(e);
        for (int i = share; i < all; i += KEY_SHARES) {
            float value = values[i];
            better += value > own || (value == own && place(i) < own_place) ? 1.0f : 0.0f;
        }
        better = sum_of_shares(better);
        if (share == 0 && e < all) stays[e] = better < static_cast<float>(most);
    }
}

// Arrays of `slots` keys that are held, and what is new behind them, in shared memory.
struct Choice {
    float* scores;
    float* liked;
    int* held;       // what the slots hold
    int* positions;
    int* stays;
    float* queries;  // sum of the last stretch's, [group, DIM]

    __device__ Choice(void* shared, int all) {
        scores = static_cast<float*>(shared), liked = scores + all;
        held = reinterpret_cast<int*>(liked + all), positions = held + all, stays = positions + all;
        queries = reinterpret_cast<float*>(stays + all);
    }

    // Of the held and `count` new ones, `by_score` stay for their scores, the others for being liked (which is overwritten);
    // those that come in take the places of those that go, in order. By the whole block.
    __device__ __forceinline__ void take_in(int slots, int count, int by_score) {
        __syncthreads();
        find_largest(stays, scores, slots, count, by_score);
        __syncthreads();
        for (int e = threadIdx.x; e < slots + count; e += blockDim.x) {
            if (stays[e]) liked[e] = -NEGATIVE_INFINITY;
        }
        __syncthreads();
        find_largest(stays, liked, slots, count, slots);
        __syncthreads();
        // One warp counts the slots that become free, another what comes in: over `stays` go their lists, never ahead of what
        // is still to be read.
        __shared__ int moving[2];
        int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        if (warp < 2) {
            int begin = warp == 0 ? 0 : slots, length = warp == 0 ? slots : count, found = 0;
            for (int at = 0; at < length; at += 32) {
                bool there = at + lane < length && (stays[begin + min(at + lane, length - 1)] != 0) == (warp == 1);
                u32 mask = __ballot_sync(0xffffffffu, there);
                __syncwarp();
                if (there) stays[begin + found + __popc(mask & ((1u << lane) - 1))] = at + lane;
                found += __popc(mask);
            }
            if (lane == 0) moving[warp] = found;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < min(moving[0], moving[1]); i += blockDim.x) {
            int slot = stays[i], j = slots + stays[slots + i];
            scores[slot] = scores[j], held[slot] = held[j], positions[slot] = positions[j];
        }
        __syncthreads();
    }
};
