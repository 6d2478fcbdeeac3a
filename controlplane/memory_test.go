package controlplane

import (
	"testing"
)

// Memory is given back when a burst is over: not during it, not again and again, and not
// for little.
func TestMemoryIsGivenBackAfterABurst(t *testing.T) {
	var m memory
	now := heap{live: 400 << 20, objects: 700 << 20, free: 100 << 20}
	step := func(allocated uint64) bool {
		before := now
		now.allocated += allocated
		if !m.settled(before, now) {
			return false
		}
		now.objects, now.free = now.live, 0
		return true
	}
	for range 10 {
		if step(200 << 20) {
			t.Fatal("while it allocates")
		}
	}
	given := 0
	for range 20 {
		if step(1 << 20) {
			given++
		}
	}
	if given != 1 {
		t.Errorf("%d times after a burst", given)
	}
	step(200 << 20)
	for range 20 {
		if step(1 << 20) {
			t.Fatal("without anything to give")
		}
	}
}
