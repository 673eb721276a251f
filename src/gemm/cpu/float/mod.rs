//! Products in f32: `few` rows of activations at the speed of memory, `many` at that of arithmetic.
//!
//! Both are generic over `vector::Vector` and stamped for every instruction set by [`isa`]. Which one runs depends on
//! the number of rows alone, and how a product is divided among threads changes no bit of it.

mod aligned;
mod few;
#[cfg(target_arch = "x86_64")]
mod found;
pub mod isa;
mod many;
mod params;
mod vector;

use self::isa::Isa;
use super::Product;
use super::tile::{self, Tile};

/// Rows of activations of a task where there are many: those of a panel of columns fit the second-level cache.
const TALL: usize = 512;
/// Rows of weights of a task where there are many rows of activations.
const WIDE: usize = 128;
/// Bytes of weights of a task where there are few rows of activations.
const TASK_BYTES: usize = 128 << 10;

/// Activations in the order that a product wants.
enum Arranged {
    Few(few::Spread),
    Many(many::Packed),
}

/// Computes all products, in one parallel region.
pub(super) fn multiply(isa: &Isa, products: Vec<Product<'_>>, small: bool) {
    let mut arranged: Vec<Arranged> = products.iter().map(|product| isa.room(product)).collect();
    let mut tasks = Vec::new();
    for (product, arranged) in products.iter().zip(&mut arranged) {
        match arranged {
            Arranged::Few(spread) => {
                for (row, x) in spread.rows().into_iter().zip(product.x.chunks(product.weights.cols())) {
                    tasks.push(Arrange::Row(product, x, row));
                }
            }
            Arranged::Many(packed) => {
                tasks.extend(packed.panels().map(|panel| Arrange::Panel(product, panel)));
            }
        }
    }
    tile::each(tasks, small, |task| match task {
        Arrange::Row(product, x, row) => isa.spread(product.weights.layout(), x, row),
        Arrange::Panel(product, panel) => isa.pack(product.x, product.weights.cols(), panel),
    });

    let mut tasks = Vec::new();
    let wanted = tile::wanted(small).div_ceil(products.len().max(1));
    for (product, arranged) in products.into_iter().zip(&arranged) {
        let Product { weights, m, y, .. } = product;
        let n = weights.rows();
        let (height, width) = match arranged {
            Arranged::Few(_) => {
                let largest = (TASK_BYTES * n / weights.bytes().max(1)).max(1);
                (m, n.div_ceil(wanted).min(largest).next_multiple_of(2))
            }
            Arranged::Many(packed) => {
                let panel = 2 * isa.lanes();
                let width = n.div_ceil(wanted).next_multiple_of(panel).min(WIDE.next_multiple_of(panel));
                let columns = n.div_ceil(width);
                let height = m.div_ceil(wanted.div_ceil(columns)).min(TALL);
                (height.next_multiple_of(packed.height()), width)
            }
        };
        tasks.extend(Tile::cut(y, m, n, height, width).into_iter().map(|tile| (weights, arranged, tile)));
    }
    tile::each(tasks, small, |(weights, arranged, mut tile)| match arranged {
        Arranged::Few(spread) => isa.few(&weights, spread, &mut tile),
        Arranged::Many(packed) => isa.many(&weights, packed, &mut tile),
    });
}

/// A part of the activations to be brought into order.
enum Arrange<'a, 'p> {
    Row(&'a Product<'p>, &'a [f32], few::SpreadRow<'a>),
    Panel(&'a Product<'p>, many::PackedPanel<'a>),
}
