package frontend

import (
	"net/http"
	"net/textproto"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// removeHopByHop removes the header fields of one connection, those that
// Connection names included.
func removeHopByHop(header http.Header) {
	for _, line := range header["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			name = textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name))
			if exchange.Removable(name) {
				header.Del(name)
			}
		}
	}
	for name := range header {
		if exchange.NameOf(name).HopByHop() {
			delete(header, name)
		}
	}
}

// upgradeOf is the protocol to which a request asks to switch, or "". A request
// with a body can't ask.
func upgradeOf(req *http.Request) string {
	if req.ProtoMajor != 1 || req.ProtoMinor < 1 || req.ContentLength != 0 || !httpguts.HeaderValuesContainsToken(req.Header["Connection"], "Upgrade") {
		return ""
	}
	values := req.Header["Upgrade"]
	if len(values) != 1 || !exchange.ValidUpgrade(values[0]) {
		return ""
	}
	return values[0]
}

// requestHeader is the header that goes to the backend, before edits.
func requestHeader(req *http.Request, upgrade string) http.Header {
	header := req.Header.Clone()
	trailers := httpguts.HeaderValuesContainsToken(header["Te"], "trailers")
	delete(header, "Host") // the host that was checked goes on, and no other
	removeHopByHop(header)
	if trailers {
		header.Set("Te", "trailers") // gRPC asks for it
	}
	if upgrade != "" {
		header.Set("Connection", "Upgrade")
		header.Set("Upgrade", upgrade)
	}
	if _, ok := header["User-Agent"]; !ok {
		header["User-Agent"] = nil // keeps transports from adding their own
	}
	return header
}

// copyHeader adds the fields of src to dst.
func copyHeader(dst, src http.Header) {
	for name, values := range src {
		dst[name] = append(dst[name], values...)
	}
}

// asWritten gives fields the names that the backend wrote, for the few clients
// that tell them apart. net/http looks at the canonical name to decide whether
// to add a field of its own: nil keeps it from that.
func asWritten(header http.Header, names map[string]string) {
	for canonical, name := range names {
		values, ok := header[canonical]
		if !ok || netHTTPsOwn[canonical] {
			continue
		}
		header[name] = values
		header[canonical] = nil
	}
}

// netHTTPsOwn are fields that net/http reads or writes itself.
var netHTTPsOwn = map[string]bool{"Connection": true, "Content-Length": true, "Trailer": true, "Transfer-Encoding": true}

// edit applies the edits of a route: first remove, then set, then add.
func edit(header http.Header, edits *resealv1.HeaderEdits) {
	for _, name := range edits.GetRemove() {
		header.Del(name)
	}
	for name, value := range edits.GetSet() {
		header.Set(name, value)
	}
	for name, value := range edits.GetAdd() {
		header.Add(name, value)
	}
}

// headerBytes is the size of a request's header as HTTP/1.1 writes it.
func headerBytes(req *http.Request) int {
	size := len(req.Method) + len(req.RequestURI) + len(req.Host) + len("  HTTP/1.1\r\nHost: \r\n\r\n")
	for name, values := range req.Header {
		for _, value := range values {
			size += len(name) + len(value) + len(": \r\n")
		}
	}
	return size
}

// headerFields is the number of fields of a request's header.
func headerFields(req *http.Request) int {
	fields := 1 // Host, which net/http has taken out
	for _, values := range req.Header {
		fields += len(values)
	}
	return fields
}

// trailerNames are the announced trailers, sorted.
func trailerNames(trailer http.Header) []string {
	var names []string
	for name := range trailer {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
