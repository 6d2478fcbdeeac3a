package http2

import (
	"errors"
	"strings"
	"sync"

	"golang.org/x/net/http2/hpack"
)

// tableSize is the size of the dynamic tables, the decoder's and at most the
// encoder's (RFC 7541 section 4). It is what everybody has without SETTINGS.
const tableSize = 4096

// entry is an entry of a table.
type entry struct {
	name, value string
	hash        uint32 // encoder only
	checked     bool   // decoder only: the characters of name and value are valid
}

// size is what an entry counts (RFC 7541 section 4.1).
func (e *entry) size() int { return len(e.name) + len(e.value) + 32 }

// static is the static table (RFC 7541 appendix A), from index 1 on, as the
// decoder of golang.org/x/net has it.
var static = sync.OnceValue(func() *[62]entry {
	var table [62]entry
	decoder := hpack.NewDecoder(0, nil)
	for i := 1; i < len(table); i++ {
		if fields, err := decoder.DecodeFull([]byte{0x80 | byte(i)}); err == nil {
			table[i] = entry{name: fields[0].Name, value: fields[0].Value, checked: true}
		}
	}
	return &table
})

// dynamicTable is a dynamic table (RFC 7541 section 2.3.2).
type dynamicTable struct {
	entries []entry // those from first on, oldest first
	first   int
	base    uint32 // how many entries came before entries[0]
	size    int
	max     int
}

func (t *dynamicTable) len() int { return len(t.entries) - t.first }

// at returns the entry of an index, from 1 on for the newest.
func (t *dynamicTable) at(i int) *entry { return &t.entries[len(t.entries)-i] }

// add adds an entry; one that is larger than the table empties it.
func (t *dynamicTable) add(e entry) {
	t.evict(t.max - e.size())
	if e.size() > t.max {
		return
	}
	t.entries = append(t.entries, e)
	t.size += e.size()
}

func (t *dynamicTable) resize(n int) {
	t.max = n
	t.evict(n)
}

// evict drops the oldest entries until the rest is no larger than size.
func (t *dynamicTable) evict(size int) {
	for t.len() > 0 && t.size > size {
		e := &t.entries[t.first]
		t.size -= e.size()
		*e = entry{}
		t.first++
	}
	if t.first > 16 && t.first > t.len() {
		n := copy(t.entries, t.entries[t.first:])
		clear(t.entries[n:])
		t.base += uint32(t.first)
		t.entries, t.first = t.entries[:n], 0
	}
}

// Errors of the decoder; all of them end the connection (RFC 7541 section 2.3.3
// and others).
var (
	errIndex     = errors.New("an index beyond the tables (RFC 7541 section 2.3.3)")
	errInteger   = errors.New("an integer is too large (RFC 7541 section 5.1)")
	errTruncated = errors.New("a header block ends in the middle of a field (RFC 9113 section 4.3)")
	errResize    = errors.New("a change of the table's size that is too large or late (RFC 7541 section 4.2)")
)

// decoder decodes header blocks (RFC 7541 section 6).
type decoder struct {
	static *[62]entry
	table  dynamicTable
}

func newDecoder() decoder { return decoder{static(), dynamicTable{max: tableSize}} }

// rawField is a field as it was decoded. Strings that are not in a table lie in
// the text of the scratch: they become one string together.
type rawField struct {
	name, value         string
	nameFrom, nameTo    int
	valueFrom, valueTo  int
	textName, textValue bool
	secret              bool
	// checked: the characters of the value, and of the name unless it begins with a
	// colon, are known to be valid.
	checked bool
}

// scratch is where a header block is decoded.
type scratch struct {
	fields   []rawField
	text     []byte
	cookies  []byte
	size     int // as in RFC 9113 section 10.5.1
	count    int
	overflow overflow
}

// overflow says which bound a header section broke.
type overflow int8

const (
	fits overflow = iota
	tooLarge
	tooMany
)

// Write implements io.Writer, for Huffman-coded strings.
func (s *scratch) Write(p []byte) (int, error) {
	s.text = append(s.text, p...)
	return len(p), nil
}

// decode decodes a whole block into s. Fields beyond the bounds are decoded,
// since the table has to follow, and dropped.
func (d *decoder) decode(block []byte, s *scratch, maxBytes, maxFields int) error {
	s.fields, s.text, s.size, s.count, s.overflow = s.fields[:0], s.text[:0], 0, 0, fits
	begun := false
	for len(block) > 0 {
		first := block[0]
		if first&0xe0 == 0x20 {
			n, rest, err := integer(block, 5)
			if err != nil {
				return err
			}
			if begun || n > tableSize {
				return errResize
			}
			d.table.resize(n)
			block = rest
			continue
		}
		begun = true
		mark := len(s.text)
		f, rest, err := d.field(block, first, s)
		if err != nil {
			return err
		}
		block = rest
		s.keep(f, mark, maxBytes, maxFields)
	}
	s.settle()
	return nil
}

// keep takes a field, if the bounds allow it.
func (s *scratch) keep(f rawField, mark, maxBytes, maxFields int) {
	s.size += len(f.name) + len(f.value) + f.nameTo - f.nameFrom + f.valueTo - f.valueFrom + 32
	if f.name != "cookie" && !strings.HasPrefix(f.name, ":") {
		s.count++
	}
	switch {
	case s.overflow != fits:
	case s.size > maxBytes:
		s.overflow = tooLarge
	case s.count > maxFields:
		s.overflow = tooMany
	default:
		s.fields = append(s.fields, f)
		return
	}
	s.text = s.text[:mark]
}

// settle makes one string of the text, and fields point into it.
func (s *scratch) settle() {
	text := string(s.text)
	for i := range s.fields {
		f := &s.fields[i]
		if f.textName {
			f.name = text[f.nameFrom:f.nameTo]
		}
		if f.textValue {
			f.value = text[f.valueFrom:f.valueTo]
		}
	}
}

// field decodes the first field of a block.
func (d *decoder) field(block []byte, first byte, s *scratch) (f rawField, rest []byte, err error) {
	if first&0x80 != 0 {
		i, rest, err := integer(block, 7)
		if err != nil {
			return f, nil, err
		}
		e, err := d.at(i)
		if err != nil {
			return f, nil, err
		}
		return rawField{name: e.name, value: e.value, checked: e.checked}, rest, nil
	}
	prefix, indexing := 4, first&0xc0 == 0x40
	if indexing {
		prefix = 6
	}
	i, rest, err := integer(block, prefix)
	if err != nil {
		return f, nil, err
	}
	f.secret = first&0xf0 == 0x10
	if i > 0 {
		e, err := d.at(i)
		if err != nil {
			return f, nil, err
		}
		f.name = e.name
	} else {
		f.textName, f.nameFrom = true, len(s.text)
		if rest, err = s.literal(rest); err != nil {
			return f, nil, err
		}
		f.nameTo = len(s.text)
	}
	f.textValue, f.valueFrom = true, len(s.text)
	if rest, err = s.literal(rest); err != nil {
		return f, nil, err
	}
	f.valueTo = len(s.text)
	if indexing {
		f = s.own(f)
		f.checked = validValue(f.value) && (validName(f.name) || strings.HasPrefix(f.name, ":"))
		d.table.add(entry{name: f.name, value: f.value, checked: f.checked})
	}
	return f, rest, nil
}

// own gives a field strings of its own, which a table may keep.
func (s *scratch) own(f rawField) rawField {
	if f.textName {
		text := string(s.text[f.nameFrom:f.valueTo])
		s.text = s.text[:f.nameFrom]
		n := f.nameTo - f.nameFrom
		return rawField{name: text[:n], value: text[n:]}
	}
	value := string(s.text[f.valueFrom:f.valueTo])
	s.text = s.text[:f.valueFrom]
	return rawField{name: f.name, value: value}
}

// at returns the entry of an index in the address space of both tables.
func (d *decoder) at(i int) (*entry, error) {
	switch {
	case i == 0:
		return nil, errIndex
	case i < len(d.static):
		return &d.static[i], nil
	case i-len(d.static)+1 <= d.table.len():
		return d.table.at(i - len(d.static) + 1), nil
	}
	return nil, errIndex
}

// literal decodes a string into the text (RFC 7541 section 5.2).
func (s *scratch) literal(p []byte) (rest []byte, err error) {
	if len(p) == 0 {
		return nil, errTruncated
	}
	huffman := p[0]&0x80 != 0
	n, p, err := integer(p, 7)
	if err != nil {
		return nil, err
	}
	if n > len(p) {
		return nil, errTruncated
	}
	if huffman {
		_, err = hpack.HuffmanDecode(s, p[:n])
	} else {
		s.text = append(s.text, p[:n]...)
	}
	return p[n:], err
}

// integer decodes an integer with a prefix of so many bits (RFC 7541 section
// 5.1). No integer that has a use needs more than four bytes behind the prefix.
func integer(p []byte, prefix int) (n int, rest []byte, err error) {
	if len(p) == 0 {
		return 0, nil, errTruncated
	}
	most := 1<<prefix - 1
	n, p = int(p[0])&most, p[1:]
	if n < most {
		return n, p, nil
	}
	for shift := 0; shift < 28; shift += 7 {
		if len(p) == 0 {
			return 0, nil, errTruncated
		}
		b := p[0]
		p = p[1:]
		n += int(b&0x7f) << shift
		if b&0x80 == 0 {
			return n, p, nil
		}
	}
	return 0, nil, errInteger
}
