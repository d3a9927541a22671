//! Memory for the weights of a model, on large pages.

use burn::tensor::{AllocationProperty, Bytes, Element};
use bytemuck::Pod;
use bytes::BytesMut;

/// What is asked for at a time, more than [`FROM_SYSTEM`].
const SLAB: usize = 128 << 20;

/// From here on, common allocators take memory from the system and give it back there.
const FROM_SYSTEM: usize = 32 << 20;

/// A large page of the system: of x86-64, and of ARM with pages of 4 KiB.
const LARGE_PAGE: usize = 2 << 20;

/// Where a tensor begins is a multiple of this, a line of the cache.
const ALIGNED: usize = 64;

/// Tensors below this size lie elsewhere: they are read too seldom to count.
const SMALL: usize = 64 << 10;

/// Places the tensors of a model one after the other in a few large pieces of memory, for which the system is
/// asked for large pages.
///
/// Decoding reads every weight for every token, and on pages of 4 KiB a core waits at each for its place
/// in memory to be looked up. A piece goes back to the system when the last of its tensors is dropped.
/// Where the system has no large pages, or gives none, the tensors lie on common ones.
#[derive(Debug)]
pub struct WeightMemory {
    rest: BytesMut,
    /// Bytes of the tensors that are still to be placed, about.
    to_come: usize,
}

impl WeightMemory {
    /// For tensors of `size` bytes in all, about: the last piece is not larger than what is left of them.
    pub fn for_size(size: usize) -> Self {
        Self { rest: BytesMut::new(), to_come: size }
    }

    /// The bytes of `count` values, all zero, which `fill` writes.
    pub fn place<T: Element + Pod>(&mut self, count: usize, fill: impl FnOnce(&mut [T])) -> Bytes {
        let size = count * size_of::<T>();
        let to_come = self.to_come;
        self.to_come = to_come.saturating_sub(size);
        if size < SMALL {
            let mut values = vec![T::zeroed(); count];
            fill(&mut values);
            return Bytes::from_elems(values);
        }
        let taken = size.next_multiple_of(ALIGNED);
        if self.rest.len() < taken {
            self.rest = slab(to_come.clamp(taken, SLAB.max(taken)));
        }
        let mut place = self.rest.split_to(taken);
        place.truncate(size);
        fill(bytemuck::cast_slice_mut(&mut place));
        Bytes::from_shared(place.freeze(), AllocationProperty::Native)
    }
}

/// An empty vector with room for so many values, on large pages where the allocator takes it from the system:
/// otherwise its first use is a visit to the system for every 4 KiB.
pub(crate) fn with_large_pages(count: usize) -> Vec<f32> {
    let mut memory = Vec::<f32>::with_capacity(count);
    let room = memory.spare_capacity_mut();
    if size_of_val(room) >= FROM_SYSTEM {
        let end = room.len() / (LARGE_PAGE / 4) * (LARGE_PAGE / 4);
        let start = room.as_ptr().align_offset(LARGE_PAGE).min(end);
        ask_for_large_pages(&mut room[start..end]);
    }
    memory
}

/// So many zeros, that begin where a large page does.
fn slab(size: usize) -> BytesMut {
    let mut memory = BytesMut::zeroed(size + LARGE_PAGE);
    let before = memory.as_ptr().align_offset(LARGE_PAGE);
    drop(memory.split_to(before.min(LARGE_PAGE)));
    memory.truncate(size);
    // Not where the end would take a whole large page for a part of one.
    ask_for_large_pages(&mut memory[..size / LARGE_PAGE * LARGE_PAGE]);
    memory
}

/// Asks the system to put large pages under this memory; a hint, which changes no value in it.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn ask_for_large_pages<T>(memory: &mut [T]) {
    // SAFETY: the range is this slice, mapped and borrowed for the call. MADV_HUGEPAGE says how the system may
    // back it and keeps what it holds; a system without large pages answers with an error, which is as good.
    let _ = unsafe {
        libc::madvise(memory.as_mut_ptr().cast(), size_of_val(memory), libc::MADV_HUGEPAGE)
    };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<T>(_: &mut [T]) {}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::{DType, TensorData};
    use half::bf16;

    use super::*;
    use crate::samples::values;
    use crate::{FlexTensor, linear};

    fn tensor(bytes: Bytes, shape: [usize; 2], dtype: DType) -> FlexTensor {
        Flex::float_from_data(TensorData::from_bytes(bytes, shape, dtype), &Default::default())
    }

    #[test]
    fn tensors_of_all_sizes_and_types_hold_what_was_written() {
        let mut memory = WeightMemory::for_size(100 << 20);
        // Below and at the smallest, odd ends, more than is left, and more than a slab.
        let counts = [0, 1, SMALL / 4 - 1, SMALL / 4, 100_001, 5 << 20, 12 << 20, 33 << 20, 40_000];
        let placed: Vec<Bytes> = counts
            .iter()
            .map(|&count| {
                memory.place(count, |values: &mut [f32]| {
                    assert!(values.iter().all(|value| *value == 0.0));
                    values.iter_mut().zip(0..).for_each(|(value, i)| *value = (count + i) as f32);
                })
            })
            .collect();
        drop(memory);
        for (count, bytes) in counts.into_iter().zip(placed) {
            let found = TensorData::from_bytes(bytes, [count], DType::F32);
            let found: Vec<f32> = found.try_to_vec().unwrap();
            assert!(
                found.iter().zip(0..).all(|(value, i)| *value == (count + i) as f32),
                "{count}"
            );
            assert_eq!(found.len(), count);
        }
    }

    #[test]
    fn a_piece_begins_where_a_large_page_does_and_its_tensors_follow_each_other() {
        for size in [1, LARGE_PAGE - 1, LARGE_PAGE, 5 * LARGE_PAGE + 7] {
            let slab = slab(size);
            assert_eq!(slab.len(), size);
            assert_eq!(slab.as_ptr() as usize % LARGE_PAGE, 0);
        }
        let mut memory = WeightMemory::for_size(1 << 20);
        let (mut places, counts) = (Vec::new(), [30_001, 40_000, 20_000]);
        let placed = counts.map(|count| {
            memory.place(count, |values: &mut [f32]| places.push(values.as_ptr() as usize))
        });
        let taken = counts.map(|count| (count * 4usize).next_multiple_of(ALIGNED));
        assert_eq!(places[0] % LARGE_PAGE, 0);
        assert_eq!(places[1..], [places[0] + taken[0], places[0] + taken[0] + taken[1]]);
        assert_eq!(placed.map(|bytes| bytes.as_ptr() as usize)[..], places);
    }

    #[test]
    fn they_are_multiplied_as_others_are_and_a_change_stays_their_own() {
        let [rows, columns] = [300, 400];
        let number = |at: usize| bf16::from_f32((at % 37) as f32 - 18.0);
        let mut memory = WeightMemory::for_size(1 << 20);
        let mut place = || {
            let bytes = memory.place(rows * columns, |values: &mut [bf16]| {
                values.iter_mut().zip(0..).for_each(|(value, at)| *value = number(at));
            });
            tensor(bytes, [rows, columns], DType::BF16)
        };
        let (first, second) = (place(), place());
        let plain: Vec<bf16> = (0..rows * columns).map(number).collect();
        let plain =
            Flex::float_from_data(TensorData::new(plain, [rows, columns]), &Default::default());
        let x = Flex::float_from_data(
            TensorData::new((0..rows).map(number).collect::<Vec<_>>(), [1, rows]),
            &Default::default(),
        );
        let expected = values(&linear(x.clone(), plain.clone(), None));
        assert_eq!(values(&linear(x.clone(), first.clone(), None)), expected);
        let doubled = Flex::float_mul_scalar(first, 2.0.into());
        assert_eq!(values(&doubled), values(&Flex::float_mul_scalar(plain, 2.0.into())));
        assert_eq!(values(&linear(x, second, None)), expected);
    }
}
