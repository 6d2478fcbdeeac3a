package loop

import "math/bits"

const (
	// smallest and largest are the sizes between which buffers are lent; what is
	// larger is made and dropped.
	smallest = 4 << 10
	largest  = 256 << 10
	classes  = 7
	// keptBytes bounds what a class keeps for the next who asks.
	keptBytes = 1 << 20
)

// buffers lends memory, in powers of two. It belongs to one loop; the last that
// came back is the first to be lent, while it is in the processor's cache.
type buffers struct {
	free [classes][][]byte
}

// class is the index of the smallest size that holds n bytes.
func class(n int) int {
	if n <= smallest {
		return 0
	}
	return bits.Len(uint(n-1)) - bits.Len(uint(smallest-1))
}

// lend returns an empty buffer with a capacity of at least n.
func (b *buffers) lend(n int) []byte {
	if n > largest {
		return make([]byte, 0, n)
	}
	k := class(n)
	if last := len(b.free[k]) - 1; last >= 0 {
		buffer := b.free[k][last]
		b.free[k][last] = nil
		b.free[k] = b.free[k][:last]
		return buffer
	}
	return make([]byte, 0, smallest<<k)
}

// take takes a buffer back, which may be nil.
func (b *buffers) take(buffer []byte) {
	n := cap(buffer)
	if n < smallest || n > largest {
		return
	}
	k := class(n)
	if n == smallest<<k && (len(b.free[k])+1)*n <= keptBytes {
		b.free[k] = append(b.free[k], buffer[:0])
	}
}

// append appends p to a lent buffer, which may be nil, and exchanges it for a
// larger one when it must.
func (b *buffers) append(buffer, p []byte) []byte {
	if need := len(buffer) + len(p); need > cap(buffer) {
		larger := append(b.lend(max(need, min(2*cap(buffer), largest))), buffer...)
		b.take(buffer)
		buffer = larger
	}
	return append(buffer, p...)
}
