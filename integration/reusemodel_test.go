package integration

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// manner is how a proxy chooses within what a mode of http-reuse allows.
type manner struct {
	// h2First: the first request on an HTTP/2 connection of a client counts as
	// first. HAProxy does not say so, but lets it use what later ones may.
	h2First bool
	// order sorts the connections that a request may use: it takes the first.
	order func(play play, first bool, a, b *modelConn) int
}

// byHAProxy is HAProxy's manner, which its manual leaves open: of idle
// connections the one that has been so for the longest time, where later
// requests prefer those that have not been reused and first ones the others.
var byHAProxy = manner{order: func(play play, first bool, a, b *modelConn) int {
	if play.backendH2 {
		return cmp.Or(firstIf(a.streams > 0, b.streams > 0), cmp.Compare(a.rested, b.rested))
	}
	return cmp.Or(firstIf(a.reused() == first, b.reused() == first), cmp.Compare(a.rested, b.rested))
}}

// byReseal is Reseal's manner: the idle connection that was used last, so that
// those that are not needed end by idleTimeout. HTTP/2 connections in the order
// in which they were opened, so that few carry much.
var byReseal = manner{h2First: true, order: func(play play, first bool, a, b *modelConn) int {
	switch {
	case play.backendH2 && play.mode == "safe":
		return cmp.Or(firstIf(a.streams > 0, b.streams > 0), cmp.Compare(a.number, b.number))
	case play.backendH2:
		return cmp.Compare(a.number, b.number)
	case play.mode == "aggressive" && !first:
		return cmp.Or(firstIf(!a.reused(), !b.reused()), cmp.Compare(b.rested, a.rested))
	}
	return cmp.Compare(b.rested, a.rested)
}}

func firstIf(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// modelConn is a connection to the backend.
type modelConn struct {
	number  int // from 1
	served  int
	streams int
	owner   string
	rested  int // step of its newest rest
}

func (c *modelConn) reused() bool { return c.served > 1 }

// model is what http-reuse means by HAProxy's manual.
type model struct {
	play   play
	manner manner
	step   int
	opened int
	conns  []*modelConn
	asked  map[string]bool // clients that have made a request
}

// predict returns what perform must return.
func predict(play play, manner manner) string {
	m := &model{play: play, manner: manner, asked: make(map[string]bool)}
	connections := make(map[string]int) // of each client so far
	waiting := make(map[string][]*modelConn)
	var partition []string
	for _, step := range strings.Fields(play.script) {
		m.step++
		name := step[:1]
		client := fmt.Sprint(name, connections[name])
		switch step[1:] {
		case ".":
			connections[name]++
			continue
		case "-":
			m.rest(waiting[client][0])
			waiting[client] = waiting[client][1:]
			continue
		}
		conn := m.request(client)
		partition = append(partition, fmt.Sprint(name, conn.number))
		switch step[1:] {
		case "+":
			waiting[client] = append(waiting[client], conn)
		case "!":
			m.conns = slices.DeleteFunc(m.conns, func(c *modelConn) bool { return c == conn })
		default:
			m.rest(conn)
		}
	}
	return strings.Join(partition, " ")
}

func (m *model) request(client string) *modelConn {
	first := !m.asked[client] && (!m.play.clientsH2 || m.manner.h2First)
	m.asked[client] = true
	var usable []*modelConn
	for _, conn := range m.conns {
		if m.usable(conn, client, first) {
			usable = append(usable, conn)
		}
	}
	var conn *modelConn
	if len(usable) > 0 {
		slices.SortStableFunc(usable, func(a, b *modelConn) int { return m.manner.order(m.play, first, a, b) })
		conn = usable[0]
	} else {
		m.opened++
		conn = &modelConn{number: m.opened}
		m.conns = append(m.conns, conn)
	}
	conn.served++
	conn.streams++
	conn.owner = client
	return conn
}

func (m *model) usable(conn *modelConn, client string, first bool) bool {
	if conn.streams > 0 && !m.play.backendH2 {
		return false
	}
	switch m.play.mode {
	case "never":
		return conn.owner == client
	case "safe":
		// One that a slow answer may block (head of line) is its client's alone.
		return conn.streams > 0 && conn.owner == client || conn.streams == 0 && !first
	case "aggressive":
		// HAProxy takes an HTTP/2 connection as reused as soon as it has answered.
		return !first || conn.reused() && !m.play.backendH2 || m.play.backendH2 && conn.served > conn.streams
	}
	return true
}

func (m *model) rest(conn *modelConn) {
	conn.streams--
	conn.rested = m.step
}
