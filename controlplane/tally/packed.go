package tally

import (
	"cmp"
	"slices"
	"unique"
)

// packed are the counters of one pool or listener as reports keep them: immutable, and
// a tenth of the size of counters, since there is one for each pool of each edge.
// Names are kept once for all edges. In the data all numbers are varints, in this
// order: the plain counters, the gauges, then per kind of divided counter how many
// there are, and each as the place of its word and its count, sorted by place; then the epochs, with
// the name of a keyring only where it differs from the epoch's before. Counters that
// are equal have equal data, among those that were packed with the same vocabularies.
type packed struct {
	name unique.Handle[string]
	data string
}

// cellBytes are what one of maxCells stands for, in bytes of data. Small counters
// count as one, too.
const cellBytes = 256

func (p *packed) cells() int { return 1 + len(p.data)/cellBytes }

func (p *packed) equal(other *packed) bool {
	return p == other || p.name == other.name && p.data == other.data
}

func comparePacked(a, b *packed) int { return cmp.Compare(a.name.Value(), b.name.Value()) }

// byName finds counters in a sorted list.
func byName(all []*packed, name string) *packed {
	i, ok := slices.BinarySearchFunc(all, name, func(p *packed, name string) int { return cmp.Compare(p.name.Value(), name) })
	if !ok {
		return nil
	}
	return all[i]
}

// unpack is the reverse of draft.pack.
func (words *vocabularies) unpack(p *packed) *counters {
	c := &counters{name: p.name.Value()}
	words.addTo(c, p, everything)
	return c
}

// parts says what addTo adds.
type parts int

const (
	lasting    parts = iota // what is not true of a moment only
	withGauges              // those too
	everything              // and the epochs
)

// addTo adds packed counters to c, of which nothing else holds any part.
func (words *vocabularies) addTo(c *counters, p *packed, what parts) {
	r := reader(p.data)
	for i := range c.plain {
		c.plain[i] += r.next()
	}
	active, idle, budget := int64(r.next()), int64(r.next()), int64(r.next())
	if what >= withGauges {
		c.active += active
		c.idle += idle
		c.budget += budget
	}
	for i := range c.shares {
		c.shares[i] = words[i].addTo(c.shares[i], &r)
	}
	if what < everything {
		return
	}
	keyring := ""
	for range r.next() {
		if named := r.next(); named > 0 {
			keyring = r.text(named - 1)
		}
		e := c.epoch(keyring, r.next())
		e.resumed += r.next()
		e.misses = words[byMiss].addTo(e.misses, &r)
	}
}

// addTo adds the shares that r reads.
func (v *vocabulary) addTo(shares []share, r *reader) []share {
	for range r.next() {
		key := v.word(r.next())
		count := r.next()
		i, ok := slices.BinarySearchFunc(shares, key, compareKeys)
		if !ok {
			shares = slices.Insert(shares, i, share{key: key})
		}
		shares[i].count += count
	}
	return shares
}

// reader reads what draft.pack has written.
type reader string

func (r *reader) next() uint64 {
	var n uint64
	for i, shift := 0, 0; i < len(*r); i, shift = i+1, shift+7 {
		b := (*r)[i]
		n |= uint64(b&0x7f) << shift
		if b < 0x80 {
			*r = (*r)[i+1:]
			return n
		}
	}
	panic("tally: packed counters end too early")
}

func (r *reader) text(length uint64) string {
	text := string((*r)[:length])
	*r = (*r)[length:]
	return text
}
