package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// capture counts the resets that one port of 127.0.0.1 gets.
type capture struct {
	tshark *process.Process
	marker *net.UDPConn
	port   string // that is watched

	mu     sync.Mutex
	resets int64
	late   int64
	sent   uint64             // marks, numbered from 1; used by flush alone
	seen   uint64             // the newest mark that was captured
	ends   map[string]*ending // by the port of the side that dialled
}

// ending is how far both sides of a connection have closed it.
type ending struct {
	after uint64 // the sequence number after the watched side's FIN
	over  bool   // the other side has sent FIN and acknowledged the watched side's
}

// newCapture starts tshark on the loopback interface and returns when it
// captures. It fails where tshark is not installed or may not capture.
func newCapture(ctx context.Context, dir, port string) (*capture, error) {
	marker, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	_, mark, err := net.SplitHostPort(marker.LocalAddr().String())
	if err != nil {
		return nil, errors.Join(err, marker.Close())
	}
	c := &capture{marker: marker, port: port, ends: make(map[string]*ending)}
	c.tshark, err = process.Start(process.Config{
		Path: "tshark", Env: []string{"TMPDIR=" + dir}, OnLine: c.line,
		Args: []string{
			"-i", "lo", "-n", "-l", "-s", "128", "-B", "16", "-o", "tcp.analyze_sequence_numbers:FALSE",
			"-f", fmt.Sprintf("tcp port %s and tcp[tcpflags] & (tcp-rst|tcp-fin) != 0 or udp dst port %s", port, mark),
			"-T", "fields", "-E", "separator=/t", "-e", "udp.payload", "-e", "tcp.srcport", "-e", "tcp.dstport",
			"-e", "tcp.flags", "-e", "tcp.seq_raw", "-e", "tcp.ack_raw", "-e", "tcp.len",
		},
	})
	if err != nil {
		return nil, errors.Join(err, marker.Close())
	}
	if err := c.flush(ctx); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// CanCapture returns why tshark can't count resets here, or nil. Files are
// written to dir.
func CanCapture(ctx context.Context, dir string) error {
	c, err := newCapture(ctx, dir, "1")
	if err != nil {
		return err
	}
	return c.close()
}

// line takes a line of tshark's, with the fields that newCapture names.
func (c *capture) line(line string) bool {
	fields := strings.Split(line, "\t")
	if len(fields) != 7 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if fields[0] != "" {
		if mark, err := strconv.ParseUint(fields[0], 16, 64); err == nil {
			c.seen = max(c.seen, mark)
		}
		return false
	}
	flags, err := strconv.ParseUint(fields[3], 0, 16)
	if err != nil {
		return true
	}
	var numbers [3]uint64 // sequence number, acknowledgement, length
	for i := range numbers {
		numbers[i], _ = strconv.ParseUint(fields[4+i], 10, 32)
	}
	if fields[1] == c.port {
		c.ended(fields[2], flags, numbers[0]+numbers[2])
	} else {
		c.dialler(fields[1], flags, numbers[1])
	}
	return false
}

const flagFIN, flagRST = 0x01, 0x04

// ended takes a packet of the watched side, whose data ends at end.
func (c *capture) ended(dialler string, flags, end uint64) {
	after := (end + 1) & 0xffffffff
	if flags&flagFIN == 0 {
		return
	}
	if e := c.ends[dialler]; e == nil || e.after != after { // otherwise it is repeated
		c.ends[dialler] = &ending{after: after}
	}
}

// dialler takes a packet of the other side.
//
// When both have sent FIN and seen the other's, the side that closed last
// forgets the connection. Should the other repeat its FIN, because it was busy
// or the machine is, then the kernel answers it with RST. That comes after the
// end and takes nothing away, so it is counted apart.
func (c *capture) dialler(port string, flags, acknowledged uint64) {
	e := c.ends[port]
	switch {
	case flags&flagRST != 0 && e != nil && e.over:
		c.late++
	case flags&flagRST != 0:
		c.resets++
	case e != nil && acknowledged == e.after:
		e.over = true
	}
}

// flush returns when all packets so far are counted: it sends marks and waits
// until one of them is seen. Those of an earlier flush may still be under way,
// so they are numbered.
func (c *capture) flush(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	before := c.sent
	return c.tshark.WaitReady(ctx, func(context.Context) error {
		c.mu.Lock()
		seen := c.seen > before
		c.mu.Unlock()
		if seen {
			return nil
		}
		c.sent++
		mark := binary.BigEndian.AppendUint64(nil, c.sent)
		if _, err := c.marker.WriteToUDP(mark, c.marker.LocalAddr().(*net.UDPAddr)); err != nil {
			return err
		}
		return errors.New("it does not see the loopback interface")
	})
}

// counts is how many resets the port got, and how many more after the
// connection's end.
func (c *capture) counts(ctx context.Context) (resets, late int64, err error) {
	if err := c.flush(ctx); err != nil {
		return 0, 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.resets, c.late, nil
}

// close ends the capture.
func (c *capture) close() error {
	return errors.Join(c.tshark.Stop(), c.marker.Close())
}

// kernelResets is how many resets this machine has sent, to whomever.
func kernelResets() (int64, error) {
	text, err := os.ReadFile("/proc/net/snmp")
	if err != nil {
		return 0, err
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i, name := range names {
			if name == "OutRsts" && i < len(fields) {
				return strconv.ParseInt(fields[i], 10, 64)
			}
		}
	}
	return 0, errors.New("no OutRsts in /proc/net/snmp")
}

// timeWaits is how many connections to a port of 127.0.0.1 wait out their time
// on the side that dialled.
func timeWaits(port string) (int64, error) {
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0, err
	}
	const timeWait = "06"
	peer := fmt.Sprintf(":%04X", number)
	var n int64
	for line := range strings.Lines(string(text)) {
		// sl local_address rem_address st ...
		fields := strings.Fields(line)
		if len(fields) > 3 && fields[3] == timeWait && strings.HasSuffix(fields[2], peer) {
			n++
		}
	}
	return n, nil
}
