package http2

import (
	"hash/maphash"
	"math/bits"
	"strconv"
	"strings"
	"sync"
)

// encoder encodes header blocks. A field goes into the dynamic table when it
// comes the second time: so what is different in each message (paths, lengths)
// does not push out what is the same in all. Strings are not Huffman-coded, as in
// HAProxy: it would cost both sides more than the bytes do.
type encoder struct {
	static *[62]entry
	names  map[string]knownName
	table  dynamicTable
	slots  *[2 * sets]slot // nil until the first field
	// A change of the table's size that has to be said at the beginning of the next
	// block, and whether it was smaller in between (RFC 7541 section 4.2).
	resized, emptied bool
}

// knownName is a name that takes no memory to write in lower case.
type knownName struct {
	name        string
	first, last uint8 // its indexes in the static table, or 0
}

// frequent are names that are frequent and not in the static table.
const frequent = "alt-svc connection content-security-policy cross-origin-opener-policy cross-origin-resource-policy forwarded " +
	"grpc-accept-encoding grpc-encoding grpc-message grpc-status grpc-timeout keep-alive origin permissions-policy pragma priority " +
	"referrer-policy sec-ch-ua sec-ch-ua-mobile sec-ch-ua-platform sec-fetch-dest sec-fetch-mode sec-fetch-site sec-fetch-user " +
	"sec-websocket-extensions sec-websocket-protocol sec-websocket-version server-timing traceparent tracestate " +
	"upgrade-insecure-requests x-content-type-options x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto " +
	"x-frame-options x-powered-by x-real-ip x-request-id x-requested-with x-xss-protection"

var knownNames = sync.OnceValue(func() map[string]knownName {
	names := map[string]knownName{}
	for i, e := range static()[1:] {
		n, ok := names[e.name]
		if !ok {
			n = knownName{name: e.name, first: uint8(i + 1)}
		}
		n.last = uint8(i + 1)
		names[e.name] = n
	}
	for name := range strings.FieldsSeq(frequent) {
		names[name] = knownName{name: name}
	}
	return names
})

// slot remembers a field by its hash, and where it stands in the table.
type slot struct {
	hash   uint32
	seq    uint32 // the number of the entry, from 1 on; 0: it was only seen
	spared bool   // another field wanted the slot already
}

// sets of two slots each; there are hardly more entries in a table.
const sets = 32

var hashSeed = maphash.MakeSeed()

func newEncoder() encoder {
	return encoder{static: static(), names: knownNames(), table: dynamicTable{max: tableSize}}
}

// resize takes the peer's SETTINGS_HEADER_TABLE_SIZE. A table that has to shrink
// is emptied: decoders of golang.org/x/net take two changes in one block only if
// the first does that.
func (e *encoder) resize(n uint32) {
	size := int(min(n, tableSize))
	if size == e.table.max {
		return
	}
	if e.resized = true; size < e.table.max {
		e.emptied = true
		e.table.resize(0)
	}
	e.table.resize(size)
}

// begin begins a block.
func (e *encoder) begin(dst []byte) []byte {
	if !e.resized {
		return dst
	}
	if e.emptied {
		dst = appendInteger(dst, 0x20, 5, 0)
	}
	if !e.emptied || e.table.max > 0 {
		dst = appendInteger(dst, 0x20, 5, e.table.max)
	}
	e.resized, e.emptied = false, false
	return dst
}

// know returns what is known of a name, which is a token, and its lower case.
func (e *encoder) know(name string) knownName {
	i := 0
	for i < len(name) && lower(name[i]) == name[i] {
		i++
	}
	if i == len(name) {
		return e.knowLower(name)
	}
	var scratch [64]byte
	low := append(scratch[:0], name[:i]...)
	for ; i < len(name); i++ {
		low = append(low, lower(name[i]))
	}
	if known, ok := e.names[string(low)]; ok {
		return known
	}
	return knownName{name: string(low)}
}

func (e *encoder) knowLower(name string) knownName {
	if known, ok := e.names[name]; ok {
		return known
	}
	return knownName{name: name}
}

// append appends a field.
func (e *encoder) append(dst []byte, index knownName, value string, secret bool) []byte {
	name := index.name
	if secret || isSecret(name) {
		return appendLiteral(dst, 0x10, 4, index.first, name, value)
	}
	if index.first > 0 {
		for i := index.first; i <= index.last; i++ {
			if e.static[i].value == value {
				return append(dst, 0x80|i)
			}
		}
	}
	hash := uint32(maphash.String(hashSeed, name)) ^ bits.RotateLeft32(uint32(maphash.String(hashSeed, value)), 7)
	s := e.slot(hash)
	if s == nil || s.hash != hash {
		if s != nil {
			s.see(hash)
		}
		return appendLiteral(dst, 0, 4, index.first, name, value)
	}
	if at := e.live(s); at != nil {
		if at.name == name && at.value == value {
			return appendInteger(dst, 0x80, 7, len(e.static)-1+e.indexOf(s))
		}
		return appendLiteral(dst, 0, 4, index.first, name, value)
	}
	fresh := entry{name: name, value: value, hash: hash}
	if fresh.size() > e.table.max/2 {
		return appendLiteral(dst, 0, 4, index.first, name, value)
	}
	// What the strings are part of must not live as long as the table.
	if index.first > 0 {
		fresh.name, fresh.value = e.static[index.first].name, strings.Clone(value)
	} else {
		text := name + value
		fresh.name, fresh.value = text[:len(name)], text[len(name):]
	}
	e.table.add(fresh)
	s.seq, s.spared = e.table.base+uint32(len(e.table.entries)), false
	return appendLiteral(dst, 0x40, 6, index.first, name, value)
}

// appendStatus appends :status; 8 is its first index in the static table.
func (e *encoder) appendStatus(dst []byte, status int) []byte {
	var digits [3]byte
	text := strconv.AppendInt(digits[:0], int64(status), 10)
	for i := byte(8); i <= 14; i++ {
		if e.static[i].value == string(text) {
			return append(dst, 0x80|i)
		}
	}
	return append(append(appendInteger(dst, 0, 4, 8), byte(len(text))), text...)
}

// slot returns where a hash is remembered, or may be. Slots of fields that are in
// the table are not taken from them: nil.
func (e *encoder) slot(hash uint32) *slot {
	if e.slots == nil {
		e.slots = new([2 * sets]slot)
	}
	pair := e.slots[hash%sets*2:][:2]
	for i := range pair {
		if pair[i].hash == hash {
			return &pair[i]
		}
	}
	one, other := &pair[hash>>31], &pair[1-hash>>31]
	if e.live(one) == nil {
		return one
	}
	if e.live(other) == nil {
		return other
	}
	return nil
}

// see takes a slot for a hash, at the second try if it has been taken: two fields
// of every message would else take it from each other for ever.
func (s *slot) see(hash uint32) {
	if s.hash == 0 || s.spared {
		*s = slot{hash: hash}
		return
	}
	s.spared = true
}

// live returns the entry of a slot while it is in the table.
func (e *encoder) live(s *slot) *entry {
	at := int(s.seq - e.table.base - 1) // numbers may wrap
	if s.seq == 0 || at < e.table.first || at >= len(e.table.entries) {
		return nil
	}
	return &e.table.entries[at]
}

// indexOf returns the index of a live entry, from 1 on for the newest.
func (e *encoder) indexOf(s *slot) int {
	return len(e.table.entries) - int(s.seq-e.table.base-1)
}

// isSecret reports whether the field's value must not be guessed by what
// compression makes of it (RFC 7541 section 7.1.3).
func isSecret(name string) bool {
	switch name {
	case "authorization", "cookie", "proxy-authorization", "set-cookie":
		return true
	}
	return false
}

// appendLiteral appends a literal field of the given representation. index is
// that of its name, or 0.
func appendLiteral(dst []byte, kind byte, prefix int, index uint8, name, value string) []byte {
	dst = appendInteger(dst, kind, prefix, int(index))
	if index == 0 {
		dst = appendString(dst, name)
	}
	return appendString(dst, value)
}

func appendString(dst []byte, s string) []byte {
	return append(appendInteger(dst, 0, 7, len(s)), s...)
}

// appendInteger appends an integer behind the bits of kind.
func appendInteger(dst []byte, kind byte, prefix, n int) []byte {
	most := 1<<prefix - 1
	if n < most {
		return append(dst, kind|byte(n))
	}
	dst = append(dst, kind|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		dst = append(dst, byte(n)|0x80)
	}
	return append(dst, byte(n))
}
