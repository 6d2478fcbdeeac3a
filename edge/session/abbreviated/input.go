package abbreviated

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
)

const (
	// smallInput is what an open connection holds to read into: enough for a
	// short answer, so that one read on the socket does.
	smallInput = 1 << 10
	// largeInput is lent while more than that comes. It holds a whole record.
	largeInput = 32 << 10
)

// largeInputs are lent from when a record does not fit into the small buffer
// until the socket has been read empty.
var largeInputs = sync.Pool{New: func() any { return new([largeInput]byte) }}

// input is what comes from the peer. Whoever holds mu reads.
type input struct {
	mu  sync.Mutex
	err error // the first lasting one

	small [smallInput]byte
	large *[largeInput]byte // lent, or nil
	buf   []byte            // small or large
	from  int               // buf[from:to] came and was not opened
	to    int
	more  bool // the last read filled the buffer: there may be more

	protection *protection
	plain      []byte // opened, not yet handed out; stands in buf
	hand       []byte // of a handshake message that is not complete
	useless    int    // records in a row that brought nothing
}

// record is one record, opened. Its content is good until the next one is read.
type record struct {
	kind    byte
	content []byte
}

// read makes sure that n bytes are in the buffer. When it fails nothing is lost:
// after a time-out it can be called again.
func (in *input) read(conn io.Reader, n int) error {
	for empty := 0; in.to-in.from < n; {
		in.makeRoom(n)
		got, err := conn.Read(in.buf[in.to:])
		in.to += got
		in.more = in.to == len(in.buf)
		switch {
		case in.to-in.from >= n:
			return nil // an error will come again
		case err == io.EOF && in.to > in.from:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case got > 0:
			empty = 0
		case empty == 100:
			return io.ErrNoProgress
		default:
			empty++
		}
	}
	return nil
}

// makeRoom makes room for n bytes from where the unread ones begin.
func (in *input) makeRoom(n int) {
	if in.from == in.to {
		in.from, in.to = 0, 0
	}
	if n <= len(in.buf)-in.from {
		return
	}
	old := in.buf
	if n > len(in.buf) {
		in.large = largeInputs.Get().(*[largeInput]byte)
		in.buf = in.large[:]
	}
	in.to = copy(in.buf, old[in.from:in.to])
	in.from = 0
}

// settle gives the large buffer back when all that came has been used and the
// socket is likely to be empty.
func (in *input) settle() {
	if in.large == nil || in.from < in.to || len(in.plain) > 0 || in.more {
		return
	}
	in.release()
}

// release gives the large buffer back with whatever is in it.
func (in *input) release() {
	if in.large == nil {
		return
	}
	largeInputs.Put(in.large)
	in.large, in.plain = nil, nil
	in.buf, in.from, in.to = in.small[:], 0, 0
}

// waits reports whether a whole record of a kind is in the buffer.
func (in *input) waits(kind byte) bool {
	came := in.buf[in.from:in.to]
	return len(came) >= headerSize && came[0] == kind &&
		len(came) >= headerSize+int(binary.BigEndian.Uint16(came[3:]))
}

// next reads one record of the peer. A time-out leaves everything as it was.
func (c *Conn) next() (record, error) {
	in := &c.in
	if in.err != nil {
		return record{}, in.err
	}
	if err := in.read(c.conn, headerSize); err != nil {
		return record{}, c.readFailed(err)
	}
	header := in.buf[in.from : in.from+headerSize]
	size := int(binary.BigEndian.Uint16(header[3:]))
	if err := c.checkHeader(header[0], binary.BigEndian.Uint16(header[1:]), size); err != nil {
		return record{}, err
	}
	if err := in.read(c.conn, headerSize+size); err != nil {
		return record{}, c.readFailed(err)
	}
	kind := in.buf[in.from]
	content := in.buf[in.from+headerSize : in.from+headerSize+size]
	in.from += headerSize + size
	if in.protection == nil {
		return record{kind, content}, nil
	}
	content, err := in.protection.open(kind, content)
	switch {
	case errors.Is(err, errExhausted):
		return record{}, c.fail(alertInternalError, err)
	case err != nil:
		return record{}, c.fail(alertBadRecordMAC, err)
	}
	return record{kind, content}, nil
}

// readFailed notes an error of the socket. All but time-outs last.
func (c *Conn) readFailed(err error) error {
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		return err
	}
	c.in.err = err
	return err
}

// checkHeader refuses a record before memory is spent on it.
func (c *Conn) checkHeader(kind byte, version uint16, size int) error {
	in := &c.in
	limit := maxPlaintext
	if in.protection != nil {
		limit += in.protection.overhead()
	}
	switch {
	case kind < recordChangeCipherSpec || kind > recordApplicationData || version>>8 != 3:
		return c.fail(alertUnexpectedMessage, errors.New("what came is not a TLS record"))
	case c.greeted && version != version12:
		return c.fail(alertProtocolVersion, errors.New("a record of another version of TLS"))
	case size > limit:
		return c.fail(alertRecordOverflow, errors.New("a record is too long"))
	case size == 0 && in.protection == nil:
		return c.fail(alertUnexpectedMessage, errors.New("an empty record"))
	}
	return nil
}

// maxUseless bounds the records in a row that bring neither data nor the
// handshake forward: warnings, empty records, requests to renegotiate.
const maxUseless = 16

func (c *Conn) countUseless() error {
	if c.in.useless++; c.in.useless > maxUseless {
		return c.fail(alertUnexpectedMessage, errors.New("too many records that bring nothing"))
	}
	return nil
}
