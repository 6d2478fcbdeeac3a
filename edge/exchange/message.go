package exchange

import (
	"iter"
	"strings"
)

// Field is one line of a header or trailer section. Name is as it was written;
// HTTP/2 has names in lower case alone.
type Field struct {
	Name, Value string
	// Secret is set when the sender asks that no table of a compressor keep the
	// field. Whoever compresses it again has to obey (RFC 7541 section 7.1.3).
	Secret bool
}

// Fields are field lines in the order in which they came. Names are compared
// without regard to case (RFC 9110 section 5.1).
type Fields []Field

// Get returns the first value of name, or "".
func (f Fields) Get(name string) string {
	for value := range f.Values(name) {
		return value
	}
	return ""
}

// Has reports whether there is a field of that name.
func (f Fields) Has(name string) bool {
	for range f.Values(name) {
		return true
	}
	return false
}

// Values yields the values of name in order.
func (f Fields) Values(name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range f {
			if len(f[i].Name) == len(name) && strings.EqualFold(f[i].Name, name) && !yield(f[i].Value) {
				return
			}
		}
	}
}

// Add appends a field.
func (f *Fields) Add(name, value string) { *f = append(*f, Field{Name: name, Value: value}) }

// Set puts value in the place of the first field of that name, which keeps its
// spelling, and removes the others; without one it appends a field.
func (f *Fields) Set(name, value string) {
	kept, found := (*f)[:0], false
	for _, field := range *f {
		if strings.EqualFold(field.Name, name) {
			if found {
				continue
			}
			field.Value, found = value, true
		}
		kept = append(kept, field)
	}
	*f = kept
	if !found {
		f.Add(name, value)
	}
}

// Del removes all fields of that name.
func (f *Fields) Del(name string) {
	kept := (*f)[:0]
	for _, field := range *f {
		if !strings.EqualFold(field.Name, name) {
			kept = append(kept, field)
		}
	}
	*f = kept
}

// Version is a version of HTTP.
type Version int8

// Versions that the edge speaks.
const (
	HTTP10 Version = iota + 1
	HTTP11
	HTTP2
)

// String returns the version as it stands in logs.
func (v Version) String() string {
	switch v {
	case HTTP10:
		return "HTTP/1.0"
	case HTTP11:
		return "HTTP/1.1"
	case HTTP2:
		return "HTTP/2.0"
	}
	return ""
}

// UnknownLength is the length of a body that ends where its framing says.
const UnknownLength = -1

// Request is the head of a request, whichever version of HTTP carries it. What
// concerns one connection alone (framing, Connection and what it names,
// Keep-Alive, TE, Upgrade, pseudo-header fields) is no part of Fields: the
// protocol machine of that connection reads and writes it (RFC 9110 section
// 7.6.1).
type Request struct {
	// Method is the method as received; methods differ by case.
	Method string
	// Scheme is "https" or, if a client says so, "http".
	Scheme string
	// Authority is the host with the port, if any, as received; the one that all
	// places of the request agree on. "" in HTTP/1.0 without Host.
	Authority string
	// Target is the origin form of the target, or "*", byte for byte as received
	// (RFC 9112 section 3.2).
	Target string
	// Protocol is what the connection, or the stream, is to become: the value of
	// Upgrade (RFC 9110 section 7.8) or :protocol (RFC 8441 section 4). "": it
	// stays HTTP.
	Protocol string
	// Fields are the other fields, Host left out.
	Fields Fields
	// Length is the body's, in bytes; 0: there is none.
	Length int64
	// Version is that of the connection on which it came.
	Version Version
	// Continue is set when the client waits for 100 before it sends its body (RFC
	// 9110 section 10.1.1).
	Continue bool
	// Trailers is set when the client takes trailers (RFC 9110 section 6.5.1).
	Trailers bool
}

// Response is the head of a response; of Fields the same holds as for Request.
type Response struct {
	// Status is the status code, 100 to 999.
	Status int
	// Protocol is what the connection becomes, if the backend has agreed to
	// Request.Protocol: with 101 in HTTP/1.1, with 2xx in HTTP/2.
	Protocol string
	// Fields are the fields, Content-Length left out.
	Fields Fields
	// Length is what Content-Length says, or UnknownLength. With a response that
	// has no body by its nature (to HEAD, 204, 304) it is passed on as it came.
	Length int64
	// Version is that of the connection on which it came.
	Version Version
}
