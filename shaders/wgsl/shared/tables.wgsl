// The two tables of format X1, as data: `EXP2` (257 entries), then `SIGMOID` (1025).

@group(0) @binding(2) var<storage, read> tables: array<i32, 1282>;

// 2^-(t/65536) in FX(fo), for t >= 0 in FX(16); 0 from t = 40 on.
fn exp2n(t: i32, fo: i32) -> i32 {
    let n = t >> 16u;
    if (n >= 40) {
        return 0;
    }
    let i = (t >> 8u) & 255;
    let a = tables[i];
    let y = a - (((a - tables[i + 1]) * (t & 255)) >> 8u);
    // y reaches 2^30, one above LIM: its tie at a shift of 31 goes to 0, as `rne` says.
    return rne(y, 30 - fo + n);
}

// The logistic function of an FX(16) value, in FX(16).
fn sigmoid(x: i32) -> i32 {
    let a = i32(min(mag(x), 1048575u));
    let i = 257 + (a >> 10u);
    let y = tables[i] + (((tables[i + 1] - tables[i]) * (a & 1023)) >> 10u);
    return select(y, 65536 - y, x < 0);
}
