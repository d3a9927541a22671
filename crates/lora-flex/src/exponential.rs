//! The exponential function in a form that compilers turn into vectors.

/// e^x for an x that is not positive, to two units in the last place; 0 where that is below the normal
/// numbers.
///
/// With n = round(x / ln 2), e^x = 2^n e^(x - n ln 2), the second by a polynomial: the method and the
/// coefficients of Cephes' `expf` (Moshier, [netlib](https://netlib.org/cephes/)).
#[inline(always)]
pub(crate) fn exp_of_negative(x: f32) -> f32 {
    const LOWEST: f32 = -87.33654; // ln of the smallest normal number
    const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23: a sum with it has no digits behind the point
    let clamped = x.max(LOWEST);
    let n = (clamped * std::f32::consts::LOG2_E + ROUNDER) - ROUNDER;
    // ln 2 in two parts, of which the first times n is exact.
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let polynomial = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = polynomial.into_iter().fold(1.987_569_1e-4, |p, coefficient| p * r + coefficient);
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    let value = (p * r * r + r + 1.0) * power;
    // Not `max`, which would make a number of NaN.
    if x < LOWEST {
        0.0
    } else if x.is_nan() {
        x
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exponential_to_two_units_in_the_last_place() {
        for step in 0..=873_000 {
            let x = -(step as f32) * 1e-4;
            let (found, exact) = (f64::from(exp_of_negative(x)), f64::from(x).exp());
            assert!((found - exact).abs() <= 2.4e-7 * exact, "{x}: {found:e} for {exact:e}");
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-0.0), 1.0);
        assert_eq!(exp_of_negative(-88.0), 0.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
        assert!(exp_of_negative(f32::NAN).is_nan());
    }
}
