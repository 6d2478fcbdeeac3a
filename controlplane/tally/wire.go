package tally

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"unicode/utf8"
	"unique"

	"google.golang.org/protobuf/encoding/protowire"
)

// Reports are decoded by hand: a fleet that comes back sends some 50 KB of them per edge,
// and the maps of a ReportRequest would be ten times that in garbage. What is read goes
// straight into the form in which it is kept.

var errReport = errors.New("a report can't be decoded")

// heard is a ReportRequest as it came, but for the counters, which are still in data.
type heard struct {
	edge    string
	bootID  string
	answers uint64
	partial bool
	counted bool // it has pools or listeners
	data    []byte
}

// Types of fields, as tags have them beside the number. Texts include messages.
const (
	varint = uint64(protowire.VarintType)
	text   = uint64(protowire.BytesType)
)

// Tags of the fields of ReportRequest that hold counters.
const (
	poolsField     = 5<<3 | text
	listenersField = 6<<3 | text
)

// hear reads a ReportRequest. The result refers to data.
func hear(data []byte) (heard, error) {
	h := heard{data: data}
	f := fields{data: data}
	for f.next() {
		switch f.tag {
		case 1<<3 | text:
			h.edge = string(f.bytes)
		case 2<<3 | text:
			h.bootID = string(f.bytes)
		case 3<<3 | varint:
			h.answers = f.value
		case poolsField, listenersField:
			h.counted = true
		case 7<<3 | varint:
			h.partial = f.value != 0
		}
	}
	if f.broken || !utf8.ValidString(h.edge) {
		return heard{}, errReport
	}
	return h, nil
}

// counters decodes and packs the pools or the listeners of a report that keep wants, within
// bounds, sorted by name. Others are counted as ignored.
func (h heard) counters(field uint64, words *vocabularies, keep func(name []byte) bool) (taken []*packed, ignored int, err error) {
	var d draft
	var scratch []byte
	f := fields{data: h.data}
	for f.next() {
		if f.tag != field {
			continue
		}
		if !d.read(f.bytes, words) {
			return nil, 0, errReport
		}
		if !keep(d.name) {
			ignored++
			continue
		}
		if len(d.name) == 0 || len(d.name) > maxName || len(taken) >= maxPerReport {
			continue
		}
		scratch = d.pack(scratch[:0])
		taken = append(taken, &packed{unique.Make(string(d.name)), string(scratch)})
	}
	return sorted(taken), ignored, nil
}

// fields goes through the fields of a message on the wire.
type fields struct {
	data   []byte
	tag    uint64
	value  uint64 // of a varint
	bytes  []byte // of a text
	broken bool
}

func (f *fields) next() bool {
	if len(f.data) == 0 || f.broken {
		return false
	}
	number, kind, n := protowire.ConsumeTag(f.data)
	if n < 0 {
		f.broken = true
		return false
	}
	f.data = f.data[n:]
	f.tag, f.value, f.bytes = uint64(number)<<3|uint64(kind), 0, nil
	switch kind {
	case protowire.VarintType:
		f.value, n = protowire.ConsumeVarint(f.data)
	case protowire.BytesType:
		f.bytes, n = protowire.ConsumeBytes(f.data)
	default:
		n = protowire.ConsumeFieldValue(number, kind, f.data)
	}
	if n < 0 {
		f.broken = true
		return false
	}
	f.data = f.data[n:]
	return true
}

// draft is one Stats while it is read. It is used again for the next, and refers to what
// it was read from.
type draft struct {
	name   []byte
	plain  [plain]uint64
	active uint64
	idle   uint64
	budget uint64
	shares [divided][]placed
	epochs []draftEpoch
}

// placed is a count by the place of its word.
type placed struct {
	place int
	count uint64
}

type draftEpoch struct {
	keyring []byte
	number  uint64
	resumed uint64
	misses  []placed
}

// read reads a Stats. It is false when it is malformed.
func (d *draft) read(data []byte, words *vocabularies) bool {
	d.clear()
	f := fields{data: data}
	ok := true
	for ok && f.next() {
		switch f.tag {
		case 1<<3 | text:
			d.name = f.bytes
		case 2<<3 | varint:
			d.plain[requests] = f.value
		case 3<<3 | text:
			ok = readCount(f.bytes, words[byError], &d.shares[byError])
		case 4<<3 | text:
			ok = d.readHandshakes(f.bytes)
		case 5<<3 | text:
			ok = readCount(f.bytes, words[byMiss], &d.shares[byMiss])
		case 6<<3 | text:
			ok = d.readConnections(f.bytes)
		case 7<<3 | text:
			ok = readCount(f.bytes, words[byClose], &d.shares[byClose])
		case 8<<3 | text:
			ok = readCount(f.bytes, words[byCloser], &d.shares[byCloser])
		case 9<<3 | text:
			ok = d.readEpoch(f.bytes, words[byMiss])
		case 10<<3 | text:
			ok = readCount(f.bytes, words[byAnswer], &d.shares[byAnswer])
		case 11<<3 | text:
			ok = readCount(f.bytes, words[byWait], &d.shares[byWait])
		}
	}
	return ok && !f.broken
}

func (d *draft) clear() {
	d.name, d.plain, d.active, d.idle, d.budget = nil, [plain]uint64{}, 0, 0, 0
	for i := range d.shares {
		d.shares[i] = d.shares[i][:0]
	}
	d.epochs = d.epochs[:0]
}

func (d *draft) readHandshakes(data []byte) bool {
	f := fields{data: data}
	for f.next() {
		switch f.tag {
		case 1<<3 | varint:
			d.plain[full] = f.value
		case 2<<3 | varint:
			d.plain[resumedSessionID] = f.value
		case 3<<3 | varint:
			d.plain[resumedTicket] = f.value
		case 4<<3 | varint:
			d.plain[resumedPSK] = f.value
		case 5<<3 | varint:
			d.plain[failed] = f.value
		}
	}
	return !f.broken
}

func (d *draft) readConnections(data []byte) bool {
	f := fields{data: data}
	for f.next() {
		switch f.tag {
		case 1<<3 | varint:
			d.plain[opened] = f.value
		case 2<<3 | varint:
			d.plain[reused] = f.value
		case 3<<3 | varint:
			d.active = gauge(f.value)
		case 4<<3 | varint:
			d.idle = gauge(f.value)
		case 5<<3 | varint:
			d.budget = gauge(f.value)
		}
	}
	return !f.broken
}

// gauge is 0 for a negative number.
func gauge(value uint64) uint64 {
	if value > math.MaxInt64 {
		return 0
	}
	return value
}

// readEpoch reads an EpochStats, within bounds.
func (d *draft) readEpoch(data []byte, words *vocabulary) bool {
	if len(d.epochs) == maxEpochs {
		return true
	}
	d.epochs = slices.Grow(d.epochs, 1)[:len(d.epochs)+1]
	e := &d.epochs[len(d.epochs)-1]
	*e = draftEpoch{misses: e.misses[:0]}
	f := fields{data: data}
	ok := true
	for ok && f.next() {
		switch f.tag {
		case 1<<3 | text:
			e.keyring = f.bytes
		case 2<<3 | varint:
			e.number = f.value
		case 3<<3 | varint:
			e.resumed = f.value
		case 4<<3 | text:
			ok = readCount(f.bytes, words, &e.misses)
		}
	}
	return ok && !f.broken
}

// readCount reads an entry of a map. Those that have, or get, the same word add up.
func readCount(data []byte, words *vocabulary, counts *[]placed) bool {
	var key []byte
	var count uint64
	f := fields{data: data}
	for f.next() {
		switch f.tag {
		case 1<<3 | text:
			key = f.bytes
		case 2<<3 | varint:
			count = f.value
		}
	}
	if f.broken || count == 0 {
		return !f.broken
	}
	place := words.place(key)
	if i := slices.IndexFunc(*counts, func(p placed) bool { return p.place == place }); i >= 0 {
		(*counts)[i].count += count
	} else {
		*counts = append(*counts, placed{place, count})
	}
	return true
}

// pack appends what was read, as packed.data has it.
func (d *draft) pack(data []byte) []byte {
	for _, n := range d.plain {
		data = binary.AppendUvarint(data, n)
	}
	data = binary.AppendUvarint(data, d.active)
	data = binary.AppendUvarint(data, d.idle)
	data = binary.AppendUvarint(data, d.budget)
	for _, counts := range d.shares {
		data = packCounts(data, counts)
	}
	epochs := slices.DeleteFunc(d.epochs, func(e draftEpoch) bool {
		named := len(e.keyring) == 0 || len(e.keyring) <= maxName && isName(string(e.keyring))
		return !named || e.resumed == 0 && len(e.misses) == 0
	})
	slices.SortStableFunc(epochs, compareDrafts)
	epochs = slices.CompactFunc(epochs, func(a, b draftEpoch) bool { return compareDrafts(a, b) == 0 })
	data = binary.AppendUvarint(data, uint64(len(epochs)))
	for i, e := range epochs {
		if i > 0 && bytes.Equal(epochs[i-1].keyring, e.keyring) {
			data = append(data, 0)
		} else {
			data = binary.AppendUvarint(data, 1+uint64(len(e.keyring)))
			data = append(data, e.keyring...)
		}
		data = binary.AppendUvarint(data, e.number)
		data = binary.AppendUvarint(data, e.resumed)
		data = packCounts(data, e.misses)
	}
	return data
}

func compareDrafts(a, b draftEpoch) int {
	return cmp.Or(bytes.Compare(a.keyring, b.keyring), cmp.Compare(a.number, b.number))
}

func packCounts(data []byte, counts []placed) []byte {
	slices.SortFunc(counts, func(a, b placed) int { return cmp.Compare(a.place, b.place) })
	data = binary.AppendUvarint(data, uint64(len(counts)))
	for _, c := range counts {
		data = binary.AppendUvarint(data, uint64(c.place))
		data = binary.AppendUvarint(data, c.count)
	}
	return data
}
