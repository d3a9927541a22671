//! Asking for memory before it is read.

/// Asks for the line of the cache that holds `words[at]`, if there is such a word; a hint, which changes no
/// result. For who goes through more weights than the caches hold: the processor's own prefetcher stops at
/// every page of 4 KiB, and then each core waits.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
pub(crate) fn prefetch(words: &[u32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(word) = words.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is in every x86-64 processor, reads nothing into the program and faults at
        // no address; this one is moreover of a live word.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast()) };
    }
    // Other processors' hints are not in stable Rust: there this does nothing.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (words, at);
}
