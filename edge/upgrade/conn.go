package upgrade

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxHead bounds the fixed part of a message, and maxData the data of a part, in bytes.
	maxHead = 64 << 10
	maxData = 64 << 20
)

// kind says what a message is.
type kind string

const (
	kindHello    kind = "hello"
	kindWelcome  kind = "welcome"
	kindRefused  kind = "refused"
	kindPart     kind = "part"
	kindOffered  kind = "offered"
	kindReady    kind = "ready"
	kindFailed   kind = "failed"
	kindGo       kind = "go"
	kindServing  kind = "serving"
	kindYours    kind = "yours"
	kindProgress kind = "progress"
	kindEnded    kind = "ended"
)

// message is what one side says: a head in JSON, of which unknown fields are ignored,
// then data as it is. A descriptor comes with its first byte.
type message struct {
	Kind kind            `json:"kind"`
	Body json.RawMessage `json:"body,omitempty"`
	Name string          `json:"name,omitempty"`
	Key  string          `json:"key,omitempty"`
	File bool            `json:"file,omitempty"`
	data []byte
	file *os.File
}

// channel sends and receives messages. One goroutine may send while another receives.
type channel struct {
	conn  *net.UnixConn
	files []*os.File // received, of messages that are yet to be read
}

// pair makes the two ends of a channel: a connection, and the file that a successor
// inherits.
func pair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "upgrade"), os.NewFile(uintptr(fds[1]), "upgrade")
	conn, err := unixConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// unixConn makes a connection of a file, which it closes.
func unixConn(file *os.File) (*net.UnixConn, error) {
	conn, err := net.FileConn(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%w: not a unix socket", ErrProtocol), conn.Close())
	}
	return socket, nil
}

// within bounds what is sent and received from now on, by time and by ctx, until the
// returned function is called.
func (c *channel) within(ctx context.Context, d time.Duration) func() {
	_ = c.conn.SetDeadline(time.Now().Add(d)) // fails only on a closed connection
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	return func() {
		if stop() {
			_ = c.conn.SetDeadline(time.Time{})
		}
	}
}

// say sends a message without data. A nil body is none.
func (c *channel) say(k kind, body any) error {
	m := message{Kind: k}
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		m.Body = encoded
	}
	return c.send(m)
}

func (c *channel) hand(parts []Part) error {
	for _, part := range parts {
		err := c.send(message{Kind: kindPart, Name: part.Name, Key: part.Key, File: part.File != nil, data: part.Data, file: part.File})
		if err != nil {
			return fmt.Errorf("hand over %s %s: %w", part.Name, part.Key, err)
		}
	}
	return nil
}

func (c *channel) send(m message) error {
	head, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(head) > maxHead || len(m.data) > maxData {
		return fmt.Errorf("it has %d bytes, at most %d are handed over", len(m.data), maxData)
	}
	first := binary.BigEndian.AppendUint32(nil, uint32(len(head)))
	first = binary.BigEndian.AppendUint32(first, uint32(len(m.data)))
	first = append(first, head...)
	if m.file == nil {
		_, err = c.conn.Write(first)
	} else {
		err = c.sendFile(first, m.file)
	}
	if err == nil && len(m.data) > 0 {
		_, err = c.conn.Write(m.data)
	}
	return lost(err)
}

// sendFile writes data, a descriptor with its first byte. The file stays as it is: to
// ask it for its descriptor in the usual way would make it block.
func (c *channel) sendFile(data []byte, file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var failed error
	err = raw.Control(func(fd uintptr) {
		n, _, failed = c.conn.WriteMsgUnix(data, unix.UnixRights(int(fd)), nil)
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	if n < len(data) {
		_, err = c.conn.Write(data[n:])
	}
	return err
}

// receive returns the next message.
func (c *channel) receive() (message, error) {
	var sizes [8]byte
	if err := c.fill(sizes[:]); err != nil {
		return message{}, err
	}
	head, data := binary.BigEndian.Uint32(sizes[:4]), binary.BigEndian.Uint32(sizes[4:])
	if head > maxHead || data > maxData {
		return message{}, fmt.Errorf("%w: a message of %d and %d bytes", ErrProtocol, head, data)
	}
	text := make([]byte, head)
	if err := c.fill(text); err != nil {
		return message{}, err
	}
	var m message
	if err := json.Unmarshal(text, &m); err != nil {
		return message{}, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if data > 0 {
		m.data = make([]byte, data)
		if err := c.fill(m.data); err != nil {
			return message{}, err
		}
	}
	if m.File {
		if len(c.files) == 0 {
			return message{}, fmt.Errorf("%w: %s %s came without its descriptor", ErrProtocol, m.Name, m.Key)
		}
		m.file, c.files = c.files[0], c.files[1:]
	}
	return m, nil
}

// fill reads len(p) bytes, and keeps the descriptors that come with them.
func (c *channel) fill(p []byte) error {
	rights := make([]byte, unix.CmsgSpace(4))
	for len(p) > 0 {
		n, r, flags, _, err := c.conn.ReadMsgUnix(p, rights)
		if err != nil {
			return lost(err)
		}
		if n == 0 {
			return ErrLost
		}
		if err := c.keep(rights[:r]); err != nil {
			return err
		}
		if flags&unix.MSG_CTRUNC != 0 {
			return fmt.Errorf("%w: a descriptor is lost; is there room for so many (ulimit -n)?", ErrProtocol)
		}
		p = p[n:]
	}
	return nil
}

func (c *channel) keep(control []byte) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		for _, fd := range fds {
			c.files = append(c.files, os.NewFile(uintptr(fd), "inherited"))
		}
	}
	return nil
}

func (c *channel) close() error {
	for _, file := range c.files {
		_ = file.Close()
	}
	c.files = nil
	return c.conn.Close()
}

// lost is ErrLost for what the end of the other process looks like.
func lost(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return ErrLost
	}
	return err
}
